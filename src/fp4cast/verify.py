"""The independent witness: reads both checkpoints again and compares values.

It decodes with `formats` alone and imports nothing of what casts (`exact`, `nearest`, `plan`, `run`), so that it
cannot share their mistakes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np

from fp4cast.checkpoint import CONFIG, RECEIPT
from fp4cast.compare import Comparison, compare_bytes, compare_pair
from fp4cast.files import Files
from fp4cast.hub import resolve
from fp4cast.report import Difference, InexactTensor, Report, digest, inexact_tensor
from fp4cast.shards import Tensor
from fp4cast.sources import Pair, fused_group
from fp4cast.structure import Work, documents, open_both, structure
from fp4cast.workers import sliced, workers

__all__ = ["verify", "verify_checkpoint"]

Progress = Callable[[int], None]
Differences = list[Difference]


def verify(
    src: str | Path,
    dst: str | Path,
    *,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Report:
    """Compare every value of an NVFP4 checkpoint with the MXFP4 one that it was made from.

    Args:
        src: the MXFP4 checkpoint: a directory or a model id.
        dst: the NVFP4 checkpoint: likewise.
        jobs: threads; None for one a core.
        progress: called, from worker threads, with the number of bytes just read, and of all.

    Returns:
        A report; `report.ok` is False and `report.differences` says why when anything is wrong.

    Raises:
        CheckpointError: one of the two cannot be read as a checkpoint at all.
    """
    return verify_checkpoint(resolve(src), resolve(dst), jobs=jobs, progress=progress)


def verify_checkpoint(
    source: Path,
    destination: Path,
    *,
    config: str = CONFIG,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Report:
    """`verify` of directories, with the destination's config under any name: `convert` checks before it publishes."""
    begin = time.monotonic()
    work = open_both(source, destination, config)
    total = work.source.checkpoint.total_size + work.destination.total_size

    differences = [*structure(work), *documents(work, config)]
    measured: dict[str, Comparison] = {}
    wrong = {difference.name for difference in differences}
    with Files() as files, workers(jobs) as pool:

        def read(nbytes: int) -> None:
            pool.check()
            progress(nbytes, total)

        pairs = [pair for pair in work.cast if not wrong.intersection(work.target.names(pair.module))]
        results = pool.map(lambda part: [_compare(work, pair, files, read) for pair in part], sliced(pairs))
        copies = pool.map(
            lambda part: [fault for tensor in part for fault in _copied(work, tensor, files, read)],
            sliced([tensor for tensor in work.untouched if tensor.name not in wrong]),
        )
        for pair, (comparison, faults) in zip(pairs, chain.from_iterable(results), strict=True):
            differences += faults
            if comparison is not None:
                measured[pair.module] = comparison
        differences += chain.from_iterable(copies)
    differences += [*_shared_scales(work, wrong), *_input_scales(work, wrong)]
    return _report(work, destination, measured, differences, time.monotonic() - begin)


def _scalar(tensor: Tensor, files: Files) -> float:
    return float(files[tensor.path].read(tensor.start, 4).view("<f4")[0])


def _positive(name: str, value: float) -> Iterator[Difference]:
    if not (math.isfinite(value) and value >= float(np.finfo(np.float32).tiny)):
        yield Difference(name, "values", f"expected a positive normal FP32 number, got {value}")


def _compare(work: Work, pair: Pair, files: Files, progress: Progress) -> tuple[Comparison | None, Differences]:
    names, tensors = work.target.names(pair.module), work.destination.tensors
    stored = _scalar(tensors[names.tensor_scale], files)
    faults = list(_positive(names.tensor_scale, stored))
    if work.target.activations == "w4a4":
        faults += _positive(names.input_scale, _scalar(tensors[names.input_scale], files))
    if any(fault.name == names.tensor_scale for fault in faults):
        return None, faults
    comparison = compare_pair(
        pair,
        tensors[names.codes],
        tensors[names.block_scale],
        1.0 / stored if work.target.reciprocal else stored,
        transposed=work.target.transposed,
        files=files,
        progress=progress,
    )
    return comparison, [*faults, *_judge(work, pair, comparison)]


def _judge(work: Work, pair: Pair, found: Comparison) -> Iterator[Difference]:
    """Whether what was measured is what the conversion said."""
    names = work.target.names(pair.module)
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
    digests, inexact = work.receipt.get("digests"), work.receipt.get("inexact")
    if not isinstance(digests, dict) or not isinstance(inexact, list):
        return False
    counts = [e.get("rounded_half_blocks") for e in inexact if isinstance(e, dict) and e.get("name") == pair.module]
    if counts != [found.rounded] or not math.isfinite(found.max_error):
        return False
    parts = [tensors[names.codes], tensors[names.block_scale], tensors[names.tensor_scale]]
    return bool(digests.get(pair.module) == digest(parts))


def _copied(work: Work, tensor: Tensor, files: Files, progress: Progress) -> Differences:
    at = compare_bytes(tensor, work.destination.tensors[tensor.name], files, progress)
    return [] if at is None else [Difference(tensor.name, "bytes", f"differs from the source from byte {at} on")]


def _input_scales(work: Work, wrong: set[str]) -> Iterator[Difference]:
    """Input scales are as they were written: no value of the source says what they must be."""
    announced = work.receipt.get("input_scales")
    names = [work.target.names(module).input_scale for module in sorted(pair.module for pair in work.cast)]
    if work.target.activations == "w4a16" or announced is None or wrong.intersection(names):
        return
    if digest([work.destination.tensors[name] for name in names]) != announced:
        yield Difference(RECEIPT, "values", "the input scales are not those that the conversion wrote")


def _shared_scales(work: Work, wrong: set[str]) -> Iterator[Difference]:
    """Projections that engines fuse have one tensor scale and one input scale."""
    cast = {pair.module for pair in work.cast}
    groups = {group for module in cast if len(group := fused_group(module)[1]) > 1}
    with Files() as files:
        for group in sorted(groups):
            members = [work.target.names(module) for module in group if module in cast]
            for kind in ("tensor_scale", "input_scale")[: 2 if work.target.activations == "w4a4" else 1]:
                names = [getattr(member, kind) for member in members]
                if not wrong.intersection(names):
                    values = {_scalar(work.destination.tensors[name], files) for name in names}
                    if len(values) > 1:
                        yield Difference(names[0], "values", f"differs from {names[1:]}: engines fuse them under one")


def _report(
    work: Work, destination: Path, measured: Mapping[str, Comparison], differences: Differences, seconds: float
) -> Report:
    pairs = {pair.module: pair for pair in work.cast}
    inexact: list[InexactTensor] = [
        inexact_tensor(name, c.rounded, pairs[name].elements, c.squared_error, c.max_error, c.energy)
        for name, c in measured.items()
        if c.rounded
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
