"""A Plan is data: for every output tensor, where its bytes come from. `run` executes it without another decision."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from fp4cast import __version__
from fp4cast.bulk import many_objects
from fp4cast.checkpoint import INDEX, SINGLE, open_checkpoint
from fp4cast.configs import documents, index_bytes, to_bytes
from fp4cast.errors import CheckpointError, UnsupportedError, UsageError
from fp4cast.exact import Scaling
from fp4cast.inputs import InputScales, InputScalesLike, load_input_scales
from fp4cast.scan import Domain, scan
from fp4cast.shards import Layout, Shard, Tensor, layout
from fp4cast.sources import Pair, Source, read_source
from fp4cast.targets import Target, choose_target

__all__ = ["Codes", "Constant", "Copy", "Output", "OutputShard", "Plan", "Scales", "check_unchanged", "make_plan"]


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


Step = Copy | Codes | Scales | Constant


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


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do.

    Attributes:
        source: the checkpoint and its MXFP4 pairs.
        target: the layout.
        domains: the scale domains that are cast, with their tensor scales.
        shards: the files to write.
        documents: the other files to write, as bytes by name; config.json among them.
        companions: the files to carry along, relative to the source.
        copied: source tensors that are carried over byte for byte.
        stamps: (name, size, modification time) of every source shard when the plan was made.
    """

    source: Source
    target: Target
    domains: tuple[Domain, ...]
    shards: tuple[OutputShard, ...]
    documents: Mapping[str, bytes]
    companions: tuple[PurePosixPath, ...]
    copied: int
    stamps: tuple[tuple[str, int, int], ...]

    @property
    def write_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.layout.size for shard in self.shards)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every shard by its name."""
        return {shard.file: shard.layout.size for shard in self.shards}

    @property
    def read_bytes(self) -> int:
        """Bytes of all source shards."""
        return sum(shard.size for shard in self.source.checkpoint.shards.values())

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two plans if and only if they read the same files and write the same bytes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.stamps}\n".encode())
        for output in self.shards:
            digest.update(output.file.encode() + output.layout.header)
            for tensor in output.outputs:
                if isinstance(tensor.step, Constant):
                    digest.update(tensor.step.data)
        for domain in self.domains:
            digest.update(f"{domain.name} {domain.scaling}\n".encode())
        for name, data in sorted(self.documents.items()):
            digest.update(name.encode() + data)
        return digest.hexdigest()


def stamp(source: Source) -> tuple[tuple[str, int, int], ...]:
    """What tells whether a source shard has changed: (name, size, modification time in ns) of each."""
    stats = ((file, shard.path.stat()) for file, shard in source.checkpoint.shards.items())
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)


def check_unchanged(plan: Plan) -> None:
    """Look whether the source is still what the plan was made from.

    Raises:
        CheckpointError: it is not.
    """
    try:
        now: object = stamp(plan.source)
    except OSError as error:
        now = error
    if now != plan.stamps:
        raise CheckpointError(
            f"{plan.source.checkpoint.path}: a shard changed while it was converted; nothing was published. "
            "Wait until its download or copy is finished and convert again."
        )


@many_objects()
def make_plan(
    path: Path,
    *,
    layout: str = "modelopt",
    activations: str | None = None,
    input_scales: InputScalesLike | None = None,
    inexact: str = "fail",
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Plan:
    """Read a checkpoint's headers and scales and decide everything; nothing is written.

    Raises:
        CheckpointError: the source is malformed, or holds nothing to cast.
        UsageError: the options do not fit the source's family.
        InexactError: a domain is not exact and `inexact` is "fail".
        InputScaleError: w4a4 without usable scales.
    """
    if inexact not in ("fail", "nearest"):
        raise UsageError(f"inexact must be 'fail' or 'nearest', got {inexact!r}")
    source = read_source(open_checkpoint(path))
    stamps = stamp(source)
    target = choose_target(source.family, layout, activations)
    cast = castable(source, target)
    amax = _activation_scales(target, input_scales, cast)
    domains = tuple(_storable(d, target) for d in scan(cast, inexact=inexact, jobs=jobs, progress=progress))
    shards = tuple(_shards(source, target, domains, amax))
    files = documents(source, target, cast, __version__)
    return Plan(
        source=source,
        target=target,
        domains=domains,
        shards=shards,
        documents=_index(shards) | {name: to_bytes(document) for name, document in files.items()},
        companions=tuple(source.checkpoint.companions()),
        copied=len(source.checkpoint.tensors) - 2 * len(cast),
        stamps=stamps,
    )


def _activation_scales(target: Target, value: InputScalesLike | None, cast: Iterable[Pair]) -> InputScales | None:
    if target.activations == "w4a16":
        if value is not None:
            raise UsageError("--input-scales belongs to --activations w4a4; w4a16 has no activation scales")
        return None
    amax = load_input_scales(value)
    amax.require(pair.module for pair in cast)
    return amax


def castable(source: Source, target: Target) -> list[Pair]:
    """The pairs that the target casts.

    Raises:
        UnsupportedError: there are none.
    """
    cast = [pair for pair in source.pairs.values() if target.casts(pair)]
    if not cast:
        raise UnsupportedError(
            f"{source.checkpoint.path}: {len(source.pairs)} MXFP4 tensors, but none that the {target.layout} layout of "
            f"{source.family.title} casts; nothing was written"
        )
    return cast


def _storable(domain: Domain, target: Target) -> Domain:
    """The domain under the tensor scale that a reader will see: where 1/S is stored, FP32 rounds that."""
    scaling = domain.scaling
    if not target.reciprocal or scaling.m is not None:
        return domain
    seen = 1.0 / float(np.float32(1.0 / scaling.tensor_scale))
    return replace(domain, scaling=replace(scaling, tensor_scale=seen))


@lru_cache(maxsize=1024)  # most domains share a few powers of two
def _float32(value: float) -> Constant:
    return Constant(np.float32(value).astype("<f4").tobytes())


def _outputs(pair: Pair, domain: Domain, target: Target, amax: InputScales | None) -> dict[str, list[Output]]:
    """A pair's new tensors by the shard they go to: where the source tensor that they come from is."""
    names, scaling = target.names(pair.module), domain.scaling
    plain = scaling.verbatim and not target.transposed
    codes = Copy(pair.codes) if plain else Codes(pair, scaling, target.transposed)
    tensor_scale = 1.0 / scaling.tensor_scale if target.reciprocal else scaling.tensor_scale
    home = [
        Output(names.codes, "U8", target.codes_shape(pair), codes),
        Output(names.tensor_scale, "F32", target.scalar_shape, _float32(tensor_scale)),
    ]
    if amax is not None:
        scale = amax.scale([member.module for member in domain.pairs])
        home.append(
            Output(names.input_scale, "F32", target.scalar_shape, _float32(1 / scale if target.reciprocal else scale))
        )
    scales = Output(
        names.block_scale, "F8_E4M3", target.block_scale_shape(pair), Scales(pair, scaling, target.transposed)
    )
    return {pair.codes.name: home, pair.scales.name: [scales]}


def _shards(
    source: Source, target: Target, domains: Iterable[Domain], amax: InputScales | None
) -> Iterable[OutputShard]:
    """Every source shard's counterpart: the same tensors in the same order, pairs replaced by what they become."""
    new: dict[str, list[Output]] = {}
    for domain in domains:
        for pair in domain.pairs:
            new |= _outputs(pair, domain, target, amax)
    for file, shard in source.checkpoint.shards.items():
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


def _index(shards: Iterable[OutputShard]) -> dict[str, bytes]:
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
