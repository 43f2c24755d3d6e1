"""A destination's files as data: what each tensor is made of, and where it lies in its file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fp4cast.casting.tight_rule import Scaling
from fp4cast.checkpoints.directory import SINGLE, Checkpoint
from fp4cast.checkpoints.header import METADATA, FileLayout, Shard, Tensor, lay_out
from fp4cast.checkpoints.index import INDEX
from fp4cast.checkpoints.json_files import index_bytes
from fp4cast.conversion.fp8_blocks import Fp8Of
from fp4cast.conversion.outside import Outside
from fp4cast.errors import UnsupportedError
from fp4cast.families.family import Pair
from fp4cast.formats import Bytes
from fp4cast.layouts.engine_view import first_below
from fp4cast.layouts.kv_cache import plain_attention
from fp4cast.layouts.layout import DTYPES, Form, Layout, Target
from fp4cast.layouts.read_back import Weight


@dataclass(frozen=True, slots=True)
class CopyOf:
    """Bytes copied from a source shard: tensors that are not cast, and codes that keep their values and order."""

    path: Path
    start: int
    nbytes: int

    @classmethod
    def tensor(cls, tensor: Tensor) -> CopyOf:
        """All bytes of a tensor."""
        return cls(tensor.path, tensor.start, tensor.nbytes)


@dataclass(frozen=True, slots=True)
class CodesOf:
    """A pair's codes that change their place (a transposed bank) or their value (shifted or rounded half-blocks).

    Attributes:
        pair: the source's codes and scales.
        scaling: its domain's.
        transposed: see `Form`.
        encoded: whether some half-blocks may change their codes; otherwise they are only transposed.
    """

    pair: Pair
    scaling: Scaling
    transposed: bool
    encoded: bool


@dataclass(frozen=True, slots=True)
class BlockScalesOf:
    """A pair's E4M3 block scales, two for each E8M0 byte; fields like those of `CodesOf`."""

    pair: Pair
    scaling: Scaling
    transposed: bool


@dataclass(frozen=True, slots=True)
class Constant:
    """Bytes known beforehand: tensor scales, input scales, and those of the KV cache."""

    data: bytes


@dataclass(frozen=True, slots=True)
class FromModel:
    """Bytes of a tensor in memory, expert by expert, made when they are written.

    Attributes:
        experts: how many; 1 for a projection.
        nbytes: bytes of one expert.
        make: returns the bytes of expert i, uint8 of any shape.
    """

    experts: int
    nbytes: int
    make: Callable[[int], Bytes]


@dataclass(frozen=True, slots=True)
class OriginalOf:
    """The codes or the E8M0 scales of the MXFP4 tensor that an NVFP4 weight becomes.

    Attributes:
        weight: the source's.
        tensor_scale: S.
        scales: the E8M0 bytes; otherwise the codes.
        changed: whether some half-blocks change their codes; otherwise these are only transposed.
        outside: the exponents that a receipt knows; None for none.
    """

    weight: Weight
    tensor_scale: float
    scales: bool
    changed: bool
    outside: Outside | None

    @property
    def pair(self) -> Pair:
        """The MXFP4 tensor."""
        return self.weight.pair

    @property
    def transposed(self) -> bool:
        """See `Form`."""
        return self.weight.form.transposed


Step = CopyOf | CodesOf | BlockScalesOf | OriginalOf | Constant | FromModel | Fp8Of


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the destination and what it is made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    step: Step


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One file of the destination, with every offset known.

    Attributes:
        file: its name.
        outputs: its tensors, in the order of their bytes.
        layout: its header and its offsets.
        mode: its permissions, before the umask: those of its counterpart, so that a private model stays private.
    """

    file: str
    outputs: tuple[Output, ...]
    layout: FileLayout
    mode: int = 0o666


def nvfp4(
    form: Form,
    module: str,
    shape: tuple[int, ...],
    codes: Step,
    scales: Step,
    tensor_scale: float,
    input_scale: float | None,
) -> tuple[list[Output], Output]:
    """The outputs of one weight: (codes and scalars, block scales), which may lie in two files.

    Args:
        form: how it is stored.
        module: the weight's name.
        shape: [N, K] or [E, N, K].
        codes: what the packed codes are made of.
        scales: what the block scales are made of.
        tensor_scale: S.
        input_scale: for W4A4, else None.
    """
    names = form.names(module)
    home = [
        Output(names.codes, DTYPES.codes, form.codes_shape(shape), codes),
        Output(names.tensor_scale, DTYPES.tensor_scale, form.scalar_shape, _scalar(tensor_scale, form.reciprocal)),
    ]
    if input_scale is not None:
        scalar = _scalar(input_scale, form.reciprocal)
        home.append(Output(names.input_scale, DTYPES.input_scale, form.scalar_shape, scalar))
    return home, Output(names.block_scale, DTYPES.block_scale, form.block_scale_shape(shape), scales)


@lru_cache(maxsize=1024)  # most domains share a few powers of two
def _scalar(value: float, reciprocal: bool) -> Constant:
    return Constant(np.float32(1 / value if reciprocal else value).astype("<f4").tobytes())


def kv_scales(
    layout: Layout, checkpoint: Checkpoint, scales: Mapping[str, tuple[float, float]]
) -> dict[str, list[Output]]:
    """The scales of an FP8 KV cache, by the source tensor that they are written beside.

    Args:
        layout: how they are named.
        checkpoint: the source.
        scales: by attention: of its keys, and of its values.

    Raises:
        UnsupportedError: the source has no tensor of an attention.
    """
    found: dict[str, list[Output]] = {}
    names = sorted(checkpoint.tensors)
    for attention, pair in scales.items():
        home = first_below(attention, names)
        if home is None:
            raise UnsupportedError(f"{checkpoint.path}: holds no tensor of {attention}, whose KV cache has scales")
        found[home] = [
            Output(f"{attention}{suffix}", DTYPES.tensor_scale, layout.projection.scalar_shape, _scalar(scale, False))
            for suffix, scale in zip(layout.kv_scales, pair, strict=True)
        ]
    return found


def kv_constants(checkpoint: Checkpoint, target: Target) -> dict[str, list[Output]]:
    """Like `kv_scales`, for `fp8_cast`: scales of 1, where the layout's readers need them; else none."""
    if target.kv_cache != "fp8_cast" or not target.layout.writes_constants:
        return {}
    return kv_scales(target.layout, checkpoint, dict.fromkeys(plain_attention(checkpoint.tensors), (1.0, 1.0)))


def place(
    checkpoint: Checkpoint, new: Mapping[str, Sequence[Output]], beside: Mapping[str, Sequence[Output]] | None = None
) -> Iterator[OutputShard]:
    """The counterpart of every source shard: the same tensors in the same order, cast ones replaced.

    Args:
        checkpoint: the source.
        new: the outputs that replace a source tensor, by its name; none for one that is dropped.
        beside: more outputs, by the source tensor whose file they go into.

    Raises:
        UnsupportedError: two tensors would have one name, or a tensor would have a name that no header can hold.
    """
    names: set[str] = set()
    for file, shard in checkpoint.shards.items():
        outputs = [
            output
            for tensor in shard.tensors.values()
            for output in (
                *(new[tensor.name] if tensor.name in new else [_copy(tensor)]),
                *(beside or {}).get(tensor.name, ()),
            )
        ]
        _add_names(names, outputs, checkpoint.path / file)
        yield _place(file, shard, outputs)


def _copy(tensor: Tensor) -> Output:
    return Output(tensor.name, tensor.dtype, tensor.shape, CopyOf.tensor(tensor))


def _add_names(names: set[str], outputs: Iterable[Output], path: Path) -> None:
    for output in outputs:
        if output.name in names:
            raise UnsupportedError(
                f"{path}: the cast would write {output.name!r} beside a source tensor of the same name"
            )
        if output.name == METADATA:
            raise UnsupportedError(
                f"{path}: the cast would write a tensor called {METADATA!r}, which no header can hold"
            )
        names.add(output.name)


def _place(file: str, shard: Shard, outputs: list[Output]) -> OutputShard:
    # transformers refuses a file that does not say which framework's names it uses.
    metadata = {"format": "pt"} | dict(shard.metadata)
    placed = lay_out(((output.name, output.dtype, output.shape) for output in outputs), metadata)
    ordered = tuple(sorted(outputs, key=lambda output: placed.offsets[output.name]))
    return OutputShard(file, ordered, placed, shard.mode & 0o666 | 0o600)


def index(shards: Iterable[OutputShard]) -> dict[str, bytes]:
    """The index with its true total size; a single `model.safetensors` needs none."""
    files = list(shards)
    if [shard.file for shard in files] == [SINGLE]:
        return {}
    total = sum(shard.layout.size - len(shard.layout.header) for shard in files)
    weight_map = {output.name: shard.file for shard in files for output in shard.outputs}
    return {INDEX: index_bytes(total, weight_map)}
