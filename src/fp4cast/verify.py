"""The independent witness: reads both checkpoints again and compares values.

It decodes with `formats` alone and imports nothing of what casts (`exact`, `nearest`, `plan`, `run`), so that it
cannot share their mistakes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fp4cast.checkpoint import CONFIG, INDEX, QUANT_CONFIG, RECEIPT, Checkpoint, open_checkpoint, read_json
from fp4cast.claims import Claims, config_faults, read_claims
from fp4cast.compare import Comparison, compare_bytes, compare_pair
from fp4cast.files import Files
from fp4cast.report import Difference, InexactTensor, Report, digest, inexact_tensor
from fp4cast.shards import Tensor
from fp4cast.sources import Pair, Source, fused_group, read_source
from fp4cast.targets import Target, choose_target
from fp4cast.workers import workers

__all__ = ["verify_checkpoint"]

Progress = Callable[[int], None]
Differences = list[Difference]


@dataclass(frozen=True)
class _Work:
    """Both sides, opened and recognised."""

    source: Source
    destination: Checkpoint
    target: Target
    claims: Claims
    receipt: Mapping[str, Any]

    @property
    def cast(self) -> list[Pair]:
        return [pair for pair in self.source.pairs.values() if self.target.casts(pair)]


def verify_checkpoint(
    source: Path,
    destination: Path,
    *,
    config: str = CONFIG,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Report:
    """Compare every value of an NVFP4 checkpoint with the MXFP4 one that it was made from.

    Args:
        source: the MXFP4 checkpoint's directory.
        destination: the NVFP4 checkpoint's directory.
        config: the name of the destination's config file.
        jobs: threads.
        progress: called from them with the number of bytes just read, and of all.

    Returns:
        A report whose figures were measured on what lies on disk; `report.differences` lists what is wrong.

    Raises:
        CheckpointError: one of the two cannot be read as a checkpoint at all.
    """
    begin = time.monotonic()
    work = _open(source, destination, config)
    total = work.source.checkpoint.total_size + work.destination.total_size

    differences = [*_structure(work), *_documents(work, config)]
    measured: dict[str, Comparison] = {}
    wrong = {difference.name for difference in differences}
    with Files() as files, workers(jobs) as pool:

        def read(nbytes: int) -> None:
            pool.check()
            progress(nbytes, total)

        pairs = [pair for pair in work.cast if not wrong.intersection(work.target.names(pair.module))]
        results = pool.map(lambda pair: _compare(work, pair, files, read), pairs)
        copies = pool.map(lambda tensor: _copied(work, tensor, files, read), list(_untouched(work, wrong)))
        for pair, (comparison, faults) in zip(pairs, results, strict=True):
            differences += faults
            if comparison is not None:
                measured[pair.module] = comparison
        differences += [fault for faults in copies for fault in faults]
    differences += [*_shared_scales(work, wrong), *_input_scales(work, wrong)]
    return _report(work, destination, measured, differences, time.monotonic() - begin)


def _open(source: Path, destination: Path, config: str) -> _Work:
    found = read_source(open_checkpoint(source))
    opened = open_checkpoint(destination, config)
    claims = read_claims(opened.config)
    receipt = read_json(destination / RECEIPT) if (destination / RECEIPT).exists() else {}
    return _Work(found, opened, choose_target(found.family, claims.layout, claims.activations), claims, receipt)


def _expected(work: _Work) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every tensor that the destination must hold."""
    table = {name: (tensor.dtype, tensor.shape) for name, tensor in work.source.checkpoint.tensors.items()}
    for pair in work.cast:
        del table[pair.codes.name], table[pair.scales.name]
        names = work.target.names(pair.module)
        table[names.codes] = ("U8", work.target.codes_shape(pair))
        table[names.block_scale] = ("F8_E4M3", work.target.block_scale_shape(pair))
        table[names.tensor_scale] = ("F32", work.target.scalar_shape)
        if work.target.activations == "w4a4":
            table[names.input_scale] = ("F32", work.target.scalar_shape)
    return table


def _structure(work: _Work) -> Iterator[Difference]:
    """Every source tensor has its counterpart, of the right dtype and shape, and nothing else is there."""
    expected, actual = _expected(work), work.destination.tensors
    for name, (dtype, shape) in expected.items():
        tensor = actual.get(name)
        if tensor is None:
            yield Difference(name, "missing", "is not in the destination")
        elif tensor.dtype != dtype:
            yield Difference(name, "dtype", f"expected {dtype}, got {tensor.dtype}")
        elif tensor.shape != shape:
            yield Difference(name, "shape", f"expected {list(shape)}, got {list(tensor.shape)}")
    for name in actual.keys() - expected.keys():
        yield Difference(name, "unexpected", "has no counterpart in the source")


def _documents(work: _Work, config: str) -> Iterator[Difference]:
    """Index, configs and companions agree with the tensors and with the source."""
    path = work.destination.path
    if (path / INDEX).exists():
        metadata = read_json(path / INDEX).get("metadata")
        claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
        if claimed != work.destination.total_size:
            yield Difference(INDEX, "index", f"total_size is {claimed}, the tensors take {work.destination.total_size}")
    beside = read_json(path / QUANT_CONFIG) if (path / QUANT_CONFIG).exists() else None
    for fault in config_faults(work.destination.config, beside):
        yield Difference(config, "config", fault)
    yield from _claimed(work, config)
    for name in work.source.checkpoint.companions():
        try:
            same = (path / name).read_bytes() == (work.source.checkpoint.path / name).read_bytes()
        except OSError as error:
            yield Difference(str(name), "file", f"cannot be read: {error.strerror}")
        else:
            if not same:
                yield Difference(str(name), "file", "differs from the source's")


def _claimed(work: _Work, config: str) -> Iterator[Difference]:
    """The config says NVFP4 of every module that was cast, and of no other."""
    cast = {pair.module for pair in work.cast}
    for module in sorted(cast):
        if not work.claims.quantized(module):
            yield Difference(config, "config", f"{module} was cast, but the config does not say that it is NVFP4")
    parts = {name for pair in work.cast for name in (pair.codes.name, pair.scales.name)}
    for name, tensor in work.source.checkpoint.tensors.items():
        module = name.removesuffix(".weight").removesuffix(".weight_packed")
        if name not in parts and module != name and len(tensor.shape) >= 2 and work.claims.quantized(module):
            yield Difference(config, "config", f"{module} was not cast, but the config says that it is NVFP4")


def _scalar(tensor: Tensor, files: Files) -> float:
    return float(files[tensor.path].read(tensor.start, 4).view("<f4")[0])


def _positive(name: str, value: float) -> Iterator[Difference]:
    if not (math.isfinite(value) and value >= float(np.finfo(np.float32).tiny)):
        yield Difference(name, "values", f"expected a positive normal FP32 number, got {value}")


def _compare(work: _Work, pair: Pair, files: Files, progress: Progress) -> tuple[Comparison | None, Differences]:
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


def _judge(work: _Work, pair: Pair, found: Comparison) -> Iterator[Difference]:
    """Whether what was measured is what the conversion said."""
    names = work.target.names(pair.module)
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


def _announced(work: _Work, pair: Pair, found: Comparison) -> bool:
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


def _untouched(work: _Work, wrong: set[str]) -> Iterator[Tensor]:
    cast = {name for pair in work.cast for name in (pair.codes.name, pair.scales.name)}
    for name, tensor in work.source.checkpoint.tensors.items():
        if name not in cast and name not in wrong:
            yield tensor


def _copied(work: _Work, tensor: Tensor, files: Files, progress: Progress) -> Differences:
    at = compare_bytes(tensor, work.destination.tensors[tensor.name], files, progress)
    return [] if at is None else [Difference(tensor.name, "bytes", f"differs from the source from byte {at} on")]


def _input_scales(work: _Work, wrong: set[str]) -> Iterator[Difference]:
    """Input scales are as they were written: no value of the source says what they must be."""
    announced = work.receipt.get("input_scales")
    names = [work.target.names(module).input_scale for module in sorted(pair.module for pair in work.cast)]
    if work.target.activations == "w4a16" or announced is None or wrong.intersection(names):
        return
    if digest([work.destination.tensors[name] for name in names]) != announced:
        yield Difference(RECEIPT, "values", "the input scales are not those that the conversion wrote")


def _shared_scales(work: _Work, wrong: set[str]) -> Iterator[Difference]:
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
    work: _Work, destination: Path, measured: Mapping[str, Comparison], differences: Differences, seconds: float
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
            "copied": len(source.tensors) - 2 * len(pairs),
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
