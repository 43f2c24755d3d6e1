"""Read both checkpoints again and compare every value; judge what was found.

It decodes with `formats` alone and imports nothing that casts, plans or writes, so that it cannot share their mistakes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from fp4cast.checkpoints.directory import CONFIG, RECEIPT, gc_paused
from fp4cast.checkpoints.gguf_file import is_gguf
from fp4cast.families.family import Pair
from fp4cast.formats import usable_scale
from fp4cast.hub.resolve import resolve
from fp4cast.parallel.engines import Engine, make_engine
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.verification.fast_path import Converted
from fp4cast.verification.figures import Fp8Tensor, inexact_tensor
from fp4cast.verification.foreign import tolerated
from fp4cast.verification.fp8_blocks import fp8_differences
from fp4cast.verification.kv_cache import kv_scale_differences
from fp4cast.verification.notes import notes_of
from fp4cast.verification.opened import Opened, open_both
from fp4cast.verification.quantized import LEAST_SNR, TOO_FAR, judge_quantized
from fp4cast.verification.receipt import weight_digest
from fp4cast.verification.report import Difference, HalfBlockCounts, Report
from fp4cast.verification.scales import input_scale_differences, shared_scale_differences
from fp4cast.verification.shard_check import ShardFindings, ShardWork, StoredScales, check_shard
from fp4cast.verification.structure import document_differences, tensor_differences
from fp4cast.verification.values import Comparison
from fp4cast.verification.work import work_of


def verify(
    src: str | Path,
    dst: str | Path,
    *,
    jobs: int | None = None,
    engine: str = "local",
    strict: bool = False,
    progress: AdvanceOf = ignore,
) -> Report:
    """Compare every value of an NVFP4 checkpoint with the MXFP4 one that it was made from.

    Args:
        src: the MXFP4 checkpoint: a directory, a model id or a GGUF file.
        dst: the NVFP4 checkpoint: a directory, a model id or a GGUF file.
        jobs: threads; None for one a core. 1 works in the caller's own thread.
        engine: "local" for this machine, or "ray" for the tasks of a Ray cluster, with `jobs` threads each.
        strict: a companion file that differs counts as wrong, too; a model card never does.
        progress: called, from worker threads, with (bytes just read, total bytes).

    Returns:
        A report; `report.ok` is False and `report.differences` says why when anything is wrong.

    Raises:
        CheckpointError: one of the two cannot be read as a checkpoint at all.
    """
    worker = make_engine(engine, jobs)
    if is_gguf(src):
        from fp4cast.verification.gguf import verify_gguf

        return verify_gguf(src, dst, jobs=jobs, strict=strict, progress=progress)
    if is_gguf(dst):
        from fp4cast.verification.gguf_source import verify_gguf_source

        return verify_gguf_source(resolve(src), dst, jobs=jobs, strict=strict, progress=progress)
    from fp4cast.verification.mlx import is_mlx_nvfp4, verify_mlx

    if is_mlx_nvfp4(dst):
        return verify_mlx(resolve(src), Path(dst), jobs=jobs, strict=strict, progress=progress)
    return verify_checkpoint(resolve(src), resolve(dst), engine=worker, strict=strict, progress=progress)


def verify_checkpoint(
    source: Path,
    destination: Path,
    *,
    engine: Engine,
    config: str = CONFIG,
    strict: bool = False,
    progress: AdvanceOf = ignore,
) -> Report:
    """Like `verify`, on directories, with the config under any name: `convert` verifies before it publishes."""
    begin, opened = time.monotonic(), open_both(source, destination, config)
    return verify_opened(opened, engine=engine, strict=strict, progress=progress, begin=begin)


def verify_opened(opened: Opened, *, engine: Engine, strict: bool, progress: AdvanceOf, begin: float) -> Report:
    """Like `verify`, of both sides as they were opened; `begin` as for `judge`."""
    total = opened.source.checkpoint.total_size + opened.destination.total_size

    def compare(todo: list[ShardWork]) -> Iterator[ShardFindings]:
        return engine.map(check_shard, todo, lambda n: progress(n, total), nbytes=lambda work: work.nbytes)

    return judge(opened, compare, strict=strict, begin=begin)


def judge(
    opened: Opened, compare: Callable[[list[ShardWork]], Iterable[ShardFindings]], *, strict: bool, begin: float
) -> Report:
    """Judge a destination.

    Args:
        opened: both sides.
        compare: makes the comparisons, or knows them: the findings of each shard's work, in its order.
        strict: see `verify`.
        begin: when it began, by `time.monotonic`.
    """
    with gc_paused():
        structural = [*tensor_differences(opened), *document_differences(opened)]
        if opened.maker:
            structural = [tolerated(difference, opened.destination.tensors) for difference in structural]
        wrong = {difference.name for difference in structural if difference.kind != "metadata"}
        todo, found = work_of(opened, wrong), _Found(structural)
    for work, findings in zip(todo, compare(todo), strict=True):
        found.add(_judge_shard(opened, work, findings))
    far, found.noise = judge_quantized(opened.selection, opened.target.layout.projection, opened.destination, wrong)
    found.differences += far
    if not opened.back:
        found.differences += [
            *shared_scale_differences(opened, wrong, found.scales),
            *input_scale_differences(opened, wrong),
            *kv_scale_differences(opened.target.layout, opened.kv_scales, opened.receipt),
        ]
    if opened.maker:
        found.differences = [tolerated(difference, opened.destination.tensors) for difference in found.differences]
    return _check_receipt(opened, _report(opened, opened.made.path, found, strict, time.monotonic() - begin))


def _check_receipt(opened: Opened, report: Report) -> Report:
    """Compare the receipt's facts with what was measured, unless they differ because weights do."""
    if report.wrong("weights"):
        return report
    said = [Difference(RECEIPT, "config", sentence) for sentence in opened.receipt.disagreements(report.facts())]
    return replace(report, differences=(*report.differences, *said))


@dataclass
class _Found:
    """The findings about a destination so far.

    Attributes:
        differences: what is wrong.
        measured: by module, for the tensors that could be compared.
        scales: by module, as stored.
        noise: by module, the SNR in dB of weights that were quantized and are no casts of MXFP4.
        fp8: by module, the SNR in dB of weights in FP8.
    """

    differences: list[Difference] = field(default_factory=list)
    measured: dict[str, Comparison] = field(default_factory=dict)
    scales: dict[str, StoredScales] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    fp8: dict[str, float] = field(default_factory=dict)

    def add(self, other: _Found) -> None:
        """Add what was found in another shard."""
        self.differences += other.differences
        self.measured |= other.measured
        self.scales |= other.scales
        self.fp8 |= other.fp8


def _judge_shard(opened: Opened, work: ShardWork, findings: ShardFindings) -> _Found:
    """The differences in one shard, and its figures."""
    found = _Found()
    for converted, comparison, stored in zip(work.converted, findings.comparisons, findings.scales, strict=True):
        found.scales[converted.pair.module] = stored
        found.differences += _judge_scales(converted, stored)
        if comparison is not None:
            found.measured[converted.pair.module] = comparison
            found.differences += _judge(opened, converted.pair, comparison)
    for (tensor, _), at in zip(work.copies, findings.copies, strict=True):
        if at is not None:
            detail = f"differs from the source from byte {at} on"
            found.differences.append(Difference(tensor.name, "bytes", detail))
    for weight, measured in zip(work.fp8, findings.fp8, strict=True):
        found.fp8[weight.module] = measured.snr_db
        found.differences += fp8_differences(weight, measured, opened.maker)
    return found


def _judge_scales(converted: Converted, stored: StoredScales) -> Iterator[Difference]:
    for tensor, value in zip((converted.tensor_scale, converted.input_scale), stored, strict=True):
        if tensor is not None and value is not None and not usable_scale(value):
            yield Difference(tensor.name, "values", f"expected a positive normal FP32 number, got {value}")


def _judge(opened: Opened, pair: Pair, found: Comparison) -> Iterator[Difference]:
    """The differences between what was measured and what the conversion announced."""
    if found.verbatim + found.shifted == 2 * pair.blocks and not (found.rounded or found.invalid or found.stray):
        return  # as for nearly every tensor
    names = opened.target.names(pair.module)
    if (seen := found.verbatim + found.shifted + found.rounded) != 2 * pair.blocks:
        yield Difference(names.codes, "values", f"{seen} half-blocks were compared, expected {2 * pair.blocks}")
    if found.invalid:
        yield Difference(names.block_scale, "scale", f"{found.invalid} block scales are NaN or negative")
    announced = _announced(opened, pair, found)
    quantized = announced and pair.module in opened.receipt.quantized
    if quantized and found.energy < found.squared_error * 10 ** (LEAST_SNR / 10):
        yield Difference(names.codes, "values", TOO_FAR)
    if found.stray and not quantized and not opened.back:
        detail = f"{found.stray} half-blocks of zeros have a scale that their exponent does not give (no value changes)"
        yield Difference(names.block_scale, "scale", detail)
    if found.nearness is not None and found.nearness.where is not None:
        block, half, error, least = found.nearness.where
        yield Difference(
            names.codes,
            "values",
            f"{found.nearness.far} rounded half-blocks are not those of least error; the first is half {half} of block "
            f"{block}: expected a squared error of {least:g} with the codes nearest to the source, got {error:g}",
        )
    if found.rounded and not announced and not (opened.maker and found.rounded == found.signs):
        block, element, expected, actual = found.where or (0, 0, math.nan, math.nan)
        if opened.back:
            expected, actual = actual, expected
        yield Difference(
            pair.codes.name if opened.back else names.codes,
            "values",
            f"{found.rounded} half-blocks hold other values than the source; the first is element {element} of block "
            f"{block}: expected {expected!r}, got {actual!r}; the largest error is {found.max_error:g}",
        )


def _announced(opened: Opened, pair: Pair, found: Comparison) -> bool:
    """Whether the receipt announces this tensor as rounded, with these counts and these very bytes."""
    receipt = opened.receipt
    if receipt.rounded.get(pair.module) != found.rounded or not math.isfinite(found.max_error):
        return False
    names = opened.target.names(pair.module)
    return receipt.digests.get(pair.module) == weight_digest(names, opened.destination.tensors)


def _report(opened: Opened, destination: Path, found: _Found, strict: bool, seconds: float) -> Report:
    pairs, measured = {pair.module: pair for pair in opened.selection.cast}, found.measured
    zeroed = sum(comparison.marlin_zeroed for comparison in measured.values())
    counts: HalfBlockCounts = {
        "verbatim": sum(c.verbatim for c in measured.values()),
        "shifted": sum(c.shifted for c in measured.values()),
        "rounded": sum(c.rounded for c in measured.values()),
    }
    report = Report.of(
        opened.source,
        opened.target,
        opened.selection,
        str(destination),
        half_blocks=counts,
        inexact=[
            inexact_tensor(name, c.rounded, pairs[name].elements, c.squared_error, c.max_error, c.energy)
            for name in pairs
            if (c := measured.get(name)) is not None and c.rounded
        ],
        unmeasured=len(pairs) - len(measured),
        marlin_exact=not zeroed,
        marlin_zeroed=zeroed,
        bytes={"read": opened.source.checkpoint.total_size + opened.destination.total_size, "written": 0},
        differences=found.differences,
        strict=strict,
        notes=tuple(notes_of(opened, found.measured, found.noise, found.fp8)),
        seconds=seconds,
        verified=True,
        fp8=[Fp8Tensor(module, found.fp8[module]) for module in opened.selection.fp8 if module in found.fp8],
    )
    return report.as_way_back(str(opened.given.path), str(destination)) if opened.back else report
