"""The independent witness: reads both checkpoints again and compares values.

It decodes with `formats` alone and imports nothing of what casts (`exact`, `nearest`, `plan`, `run`), so that it
cannot share their mistakes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fp4cast.checkpoints.directory import CONFIG, RECEIPT
from fp4cast.checkpoints.hub import resolve
from fp4cast.families.recognise import Pair, fused_group
from fp4cast.parallel.engines import Engine, make_engine
from fp4cast.verification.fast_path import Cast
from fp4cast.verification.report import Difference, InexactTensor, Report, digest, inexact_tensor
from fp4cast.verification.shard_check import Checks, Findings, perform, usable
from fp4cast.verification.structure import Work, documents, open_both, structure
from fp4cast.verification.values import Comparison

__all__ = ["verify", "verify_checkpoint"]

Differences = list[Difference]
Scales = dict[str, tuple[float, float | None]]  # (tensor scale, input scale) by module, as stored


def verify(
    src: str | Path,
    dst: str | Path,
    *,
    jobs: int | None = None,
    engine: str = "local",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Report:
    """Compare every value of an NVFP4 checkpoint with the MXFP4 one that it was made from.

    Args:
        src: the MXFP4 checkpoint: a directory or a model id.
        dst: the NVFP4 checkpoint: likewise.
        jobs: threads; None for one a core. 1 works in the caller's own thread.
        engine: "local" for this machine, or "ray" for the tasks of a Ray cluster, with `jobs` threads each.
        progress: called, from worker threads, with the number of bytes just read, and of all.

    Returns:
        A report; `report.ok` is False and `report.differences` says why when anything is wrong.

    Raises:
        CheckpointError: one of the two cannot be read as a checkpoint at all.
    """
    return verify_checkpoint(resolve(src), resolve(dst), engine=make_engine(engine, jobs), progress=progress)


def verify_checkpoint(
    source: Path,
    destination: Path,
    *,
    engine: Engine,
    config: str = CONFIG,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Report:
    """`verify` of directories, with the destination's config under any name: `convert` checks before it publishes."""
    begin = time.monotonic()
    work = open_both(source, destination, config)
    total = work.source.checkpoint.total_size + work.destination.total_size

    differences = [*structure(work), *documents(work, config)]
    measured: dict[str, Comparison] = {}
    scales: Scales = {}
    wrong = {difference.name for difference in differences}
    todo = _checks(work, wrong)
    for checks, found in zip(todo, engine.map(perform, todo, lambda n: progress(n, total)), strict=True):
        differences += _collect(work, checks, found, measured, scales)
    differences += [*_shared_scales(work, wrong, scales), *_input_scales(work, wrong)]
    return _report(work, destination, measured, differences, time.monotonic() - begin)


def _checks(work: Work, wrong: set[str]) -> list[Checks]:
    """What can be compared, by the shard of the destination; what is missing or of another shape has been said."""
    table = {shard.path: Checks() for shard in work.destination.shards.values()}
    tensors = work.destination.tensors
    for pair in work.cast:
        if not wrong.intersection(work.target.names(pair.module)):
            cast = Cast.of(pair, work.target, tensors)
            table[cast.codes.path].casts.append(cast)
    for tensor in work.untouched:
        if tensor.name not in wrong:
            copy = tensors[tensor.name]
            table[copy.path].copies.append((tensor, copy))
    return list(table.values())


def _collect(
    work: Work, checks: Checks, found: Findings, measured: dict[str, Comparison], scales: Scales
) -> Iterator[Difference]:
    """What is wrong with one shard; adds to `measured` and `scales`."""
    for cast, comparison, stored in zip(checks.casts, found.comparisons, found.scales, strict=True):
        scales[cast.pair.module] = stored
        for tensor, value in zip((cast.tensor_scale, cast.input_scale), stored, strict=True):
            if tensor is not None and value is not None and not usable(value):
                detail = f"expected a positive normal FP32 number, got {value}"
                yield Difference(tensor.name, "values", detail)
        if comparison is not None:
            measured[cast.pair.module] = comparison
            yield from _judge(work, cast.pair, comparison)
    for (tensor, _), at in zip(checks.copies, found.copies, strict=True):
        if at is not None:
            yield Difference(tensor.name, "bytes", f"differs from the source from byte {at} on")


def _judge(work: Work, pair: Pair, found: Comparison) -> Iterator[Difference]:
    """Whether what was measured is what the conversion said."""
    names = work.target.names(pair.module)
    if (seen := found.verbatim + found.shifted + found.rounded) != 2 * pair.blocks:
        yield Difference(names.codes, "values", f"{seen} half-blocks were compared, expected {2 * pair.blocks}")
    if found.invalid:
        yield Difference(names.block_scale, "scale", f"{found.invalid} block scales are NaN or negative")
    if found.stray:
        detail = f"{found.stray} half-blocks of zeros have a scale that their exponent does not give (no value changes)"
        yield Difference(names.block_scale, "scale", detail)
    if found.rounded and not _announced(work, pair, found):
        block, element, expected, actual = found.where or (0, 0, math.nan, math.nan)
        yield Difference(
            names.codes,
            "values",
            f"{found.rounded} half-blocks hold other values than the source; the first is element {element} of block "
            f"{block}: expected {expected!r}, got {actual!r}; the largest error is {found.max_error:g}",
        )


def _announced(work: Work, pair: Pair, found: Comparison) -> bool:
    """Whether the receipt announces this tensor as rounded, with these counts and these very bytes."""
    names, tensors = work.target.names(pair.module), work.destination.tensors
    digests = work.receipt.get("digests")
    if not isinstance(digests, dict) or work.announced.get(pair.module) != found.rounded:
        return False
    if not math.isfinite(found.max_error):
        return False
    parts = [tensors[names.codes], tensors[names.block_scale], tensors[names.tensor_scale]]
    return bool(digests.get(pair.module) == digest(parts))


def _input_scales(work: Work, wrong: set[str]) -> Iterator[Difference]:
    """Input scales are as they were written: no value of the source says what they must be."""
    announced = work.receipt.get("input_scales")
    names = [work.target.names(module).input_scale for module in sorted(pair.module for pair in work.cast)]
    if work.target.activations == "w4a16" or announced is None or wrong.intersection(names):
        return
    if digest([work.destination.tensors[name] for name in names]) != announced:
        yield Difference(RECEIPT, "values", "the input scales are not those that the conversion wrote")


def _shared_scales(work: Work, wrong: set[str], scales: Scales) -> Iterator[Difference]:
    """Projections that engines fuse have one tensor scale and one input scale."""
    groups = {group for module in scales if len(group := fused_group(module)[1]) > 1}
    for group in sorted(groups):
        members = [module for module in group if module in scales]
        for i, kind in enumerate(("tensor_scale", "input_scale")):
            names = [getattr(work.target.names(module), kind) for module in members]
            values = {scales[module][i] for module in members}
            if len(values) > 1 and not wrong.intersection(names):
                yield Difference(names[0], "values", f"differs from {names[1:]}: engines fuse them under one")


def _report(
    work: Work, destination: Path, measured: Mapping[str, Comparison], differences: Differences, seconds: float
) -> Report:
    pairs = {pair.module: pair for pair in work.cast}
    inexact: list[InexactTensor] = [
        inexact_tensor(name, c.rounded, pairs[name].elements, c.squared_error, c.max_error, c.energy)
        for name in pairs
        if (c := measured.get(name)) is not None and c.rounded
    ]
    exact = sum(not c.rounded for c in measured.values())
    count = {kind: sum(getattr(c, kind) for c in measured.values()) for kind in ("verbatim", "shifted", "rounded")}
    source, opened = work.source.checkpoint, work.destination
    return Report(
        source=str(source.path),
        destination=str(destination),
        family=work.source.family.name,
        layout=work.target.layout,
        activations=work.target.activations,
        exact=exact == len(pairs) and not differences,
        tensors={
            "cast": len(pairs),
            "exact": exact,
            "inexact": len(pairs) - exact,
            "copied": len(work.untouched),
        },
        half_blocks=count,
        inexact=inexact,
        marlin_exact=exact == len(pairs) and not any(c.marlin_zeroed for c in measured.values()),
        bytes={"read": source.total_size + opened.total_size, "written": 0},
        seconds=seconds,
        verified=True,
        served=work.target.served,
        differences=tuple(differences),
    )
