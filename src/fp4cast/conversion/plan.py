"""A Plan is data: for every output tensor, where its bytes come from. `run` executes it without another decision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from fp4cast import __version__
from fp4cast.bulk import many_objects
from fp4cast.checkpoints.directory import Checkpoint, open_checkpoint
from fp4cast.conversion.domains import Domain, scan
from fp4cast.conversion.input_scales import InputScales, InputScalesLike, load_input_scales
from fp4cast.conversion.recipe import Codes, Constant, Copy, Output, OutputShard, Scales, index, nvfp4, place
from fp4cast.errors import CheckpointError, UnsupportedError, UsageError
from fp4cast.families.recognise import Pair, Source, read_source
from fp4cast.layouts.documents import documents, to_bytes
from fp4cast.layouts.layout import Target, choose_target

__all__ = ["Plan", "check_stamps", "check_unchanged", "make_plan", "stamp"]


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


def stamp(checkpoint: Checkpoint) -> tuple[tuple[str, int, int], ...]:
    """What tells whether a source shard has changed: (name, size, modification time in ns) of each."""
    stats = ((file, shard.path.stat()) for file, shard in checkpoint.shards.items())
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)


def check_unchanged(plan: Plan) -> None:
    """Look whether the source is still what the plan was made from.

    Raises:
        CheckpointError: it is not.
    """
    check_stamps(plan.source.checkpoint, plan.stamps, "convert")


def check_stamps(checkpoint: Checkpoint, stamps: tuple[tuple[str, int, int], ...], work: str) -> None:
    """Look whether a checkpoint's shards are still those of these stamps.

    Args:
        checkpoint: as it was opened.
        stamps: as `stamp` gave them before.
        work: a verb for what was done meanwhile: convert, export.

    Raises:
        CheckpointError: they are not.
    """
    try:
        now: object = stamp(checkpoint)
    except OSError as error:
        now = error
    if now != stamps:
        raise CheckpointError(
            f"{checkpoint.path}: a shard changed while it was {work}ed; nothing was published. "
            f"Wait until its download or copy is finished and {work} again."
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
    stamps = stamp(source.checkpoint)
    target = choose_target(source.family, layout, activations)
    cast = castable(source, target)
    amax = _activation_scales(target, input_scales, cast)
    domains = tuple(_storable(d, target) for d in scan(cast, inexact=inexact, jobs=jobs, progress=progress))
    new: dict[str, list[Output]] = {}
    for domain in domains:
        for pair in domain.pairs:
            new |= _outputs(pair, domain, target, amax)
    shards = tuple(place(source.checkpoint, new))
    replaced = {tensor.name for pair in cast for tensor in (pair.codes, pair.scales)}
    files = documents(source.checkpoint, target, [pair.module for pair in cast], replaced, __version__)
    return Plan(
        source=source,
        target=target,
        domains=domains,
        shards=shards,
        documents=index(shards) | {name: to_bytes(document) for name, document in files.items()},
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


def _outputs(pair: Pair, domain: Domain, target: Target, amax: InputScales | None) -> dict[str, list[Output]]:
    """A pair's new tensors by the shard they go to: where the source tensor that they come from is."""
    scaling = domain.scaling
    plain = scaling.verbatim and not target.transposed
    codes = Copy(pair.codes) if plain else Codes(pair, scaling, target.transposed)
    scales = Scales(pair, scaling, target.transposed)
    input_scale = None if amax is None else float(amax.scale([member.module for member in domain.pairs]))
    home, block_scales = nvfp4(target, pair.module, pair.shape, codes, scales, scaling.tensor_scale, input_scale)
    return {pair.codes.name: home, pair.scales.name: [block_scales]}
