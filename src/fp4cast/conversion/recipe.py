"""The files of a destination as data: for every tensor, where its bytes come from, and where they will lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fp4cast.casting.tight_rule import Scaling
from fp4cast.checkpoints.directory import INDEX, SINGLE, Checkpoint
from fp4cast.checkpoints.header import Layout, Shard, Tensor, layout
from fp4cast.errors import UnsupportedError
from fp4cast.families.recognise import Pair
from fp4cast.formats import Bytes
from fp4cast.layouts.documents import index_bytes
from fp4cast.layouts.layout import Target

__all__ = ["Codes", "Constant", "Copy", "Made", "Output", "OutputShard", "Scales", "index", "nvfp4", "place"]


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of a source tensor as they are: everything that is not cast, and codes that keep their order."""

    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Codes:
    """A pair's codes where they change place (a transposed bank) or value (shifted and rounded half-blocks)."""

    pair: Pair
    scaling: Scaling
    transposed: bool


@dataclass(frozen=True, slots=True)
class Scales:
    """A pair's E4M3 block scales, two for each E8M0 byte."""

    pair: Pair
    scaling: Scaling
    transposed: bool


@dataclass(frozen=True, slots=True)
class Constant:
    """Bytes known beforehand: tensor scales and input scales."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Made:
    """Bytes of a tensor in memory, made part by part when they are written.

    Attributes:
        parts: how many parts of equal size.
        nbytes: of one part.
        make: the bytes of part i, uint8 of any shape.
    """

    parts: int
    nbytes: int
    make: Callable[[int], Bytes]


Step = Copy | Codes | Scales | Constant | Made


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the destination and how it comes to be."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    step: Step


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One file of the destination, every offset known."""

    file: str
    outputs: tuple[Output, ...]
    layout: Layout


def nvfp4(
    target: Target,
    module: str,
    shape: tuple[int, ...],
    codes: Step,
    scales: Step,
    tensor_scale: float,
    input_scale: float | None,
) -> tuple[list[Output], Output]:
    """(codes and scalars, block scales) of one weight; they may lie in two files.

    Args:
        target: how they are named, oriented and stored.
        module: the weight's name.
        shape: [N, K] or [E, N, K].
        codes: how the packed codes come to be.
        scales: how the block scales do.
        tensor_scale: S.
        input_scale: for W4A4, else None.
    """
    names = target.names(module)
    home = [
        Output(names.codes, "U8", target.codes_shape(shape), codes),
        Output(names.tensor_scale, "F32", target.scalar_shape, _scalar(tensor_scale, target.reciprocal)),
    ]
    if input_scale is not None:
        home.append(Output(names.input_scale, "F32", target.scalar_shape, _scalar(input_scale, target.reciprocal)))
    return home, Output(names.block_scale, "F8_E4M3", target.block_scale_shape(shape), scales)


@lru_cache(maxsize=1024)  # most domains share a few powers of two
def _scalar(value: float, reciprocal: bool) -> Constant:
    return Constant(np.float32(1 / value if reciprocal else value).astype("<f4").tobytes())


def place(checkpoint: Checkpoint, new: Mapping[str, Sequence[Output]]) -> Iterator[OutputShard]:
    """Every source shard's counterpart: the same tensors in the same order, some replaced by what they become.

    Args:
        checkpoint: the source.
        new: by the name of a source tensor, the outputs in its place.
    """
    for file, shard in checkpoint.shards.items():
        outputs = [
            output
            for tensor in shard.tensors.values()
            for output in new.get(tensor.name) or [Output(tensor.name, tensor.dtype, tensor.shape, Copy(tensor))]
        ]
        yield _place(file, shard, outputs)


def _place(file: str, shard: Shard, outputs: list[Output]) -> OutputShard:
    # transformers refuses a file that does not say which framework's names it uses.
    metadata = {"format": "pt"} | dict(shard.metadata)
    placed = layout(((output.name, output.dtype, output.shape) for output in outputs), metadata)
    return OutputShard(file, tuple(sorted(outputs, key=lambda output: placed.offsets[output.name])), placed)


def index(shards: Iterable[OutputShard]) -> dict[str, bytes]:
    """The index with its true total size; a single `model.safetensors` needs none."""
    files = list(shards)
    names = [output.name for shard in files for output in shard.outputs]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UnsupportedError(f"the cast would write {twice[0]!r} beside a source tensor of that name")
    if [shard.file for shard in files] == [SINGLE]:
        return {}
    total = sum(shard.layout.size - len(shard.layout.header) for shard in files)
    weight_map = {output.name: shard.file for shard in files for output in shard.outputs}
    return {INDEX: index_bytes(total, dict(sorted(weight_map.items())))}
