"""Convert a GGUF file: plan, write beside, verify, and only then give it its name."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fp4cast.casting.nearest import encode
from fp4cast.casting.tight_rule import Scaling
from fp4cast.checkpoints.byte_ranges import File, copy_range, created, sync_path, write_all
from fp4cast.checkpoints.gguf_file import SUFFIX, GgufTensor, is_gguf
from fp4cast.conversion.destination import real_path
from fp4cast.conversion.gguf_blocks import CHUNK_BLOCKS, GgufBlocks, halves, super_blocks
from fp4cast.conversion.gguf_plan import GgufPlan, Recast, make_plan, stamp_of
from fp4cast.conversion.plan import ConvertOptions
from fp4cast.conversion.refusals import only_scaled, refuse_options, unlike
from fp4cast.conversion.staging import require_space
from fp4cast.conversion.working_directory import enter, remove, state_of
from fp4cast.errors import CheckpointError, DestinationError, UnsupportedError, UsageError
from fp4cast.formats import Bytes
from fp4cast.layouts import gguf as layout
from fp4cast.layouts.choose import DEFAULT_LAYOUT
from fp4cast.parallel.progress import Advance, Progress, ignore
from fp4cast.parallel.ranges import spans
from fp4cast.parallel.workers import Workers, workers
from fp4cast.verification.gguf import verify_gguf
from fp4cast.verification.gguf_reader import gguf_report
from fp4cast.verification.report import HalfBlockCounts, Report

_WHY = "GGUF files, which are cast in one go, exactly or not at all, as W4A16"


def convert_gguf(
    src: str | Path,
    dst: str | Path,
    options: ConvertOptions,
    *,
    jobs: int | None = None,
    verify: bool = True,
    sync: bool = True,
    progress: Progress = ignore,
    **others: bool,
) -> Report:
    """Convert the MXFP4 tensors of a GGUF file into NVFP4; everything else stays byte for byte.

    Args:
        src: the file.
        dst: the file to make; nothing may be there.
        options: of the conversion; those that GGUF has no place for are refused.
        jobs: see `convert`.
        verify: see `convert`.
        sync: see `convert`.
        progress: see `convert`.
        others: options of `convert` by name, whether they were given; none of them is for GGUF.

    Raises:
        Fp4CastError: see `fp4cast.errors`; nothing is written then.
    """
    begin = time.monotonic()
    refuse_options(others, _WHY)
    destination, plan = prepare_gguf(src, dst, options, jobs=jobs, progress=progress)
    plan.require_exact()
    size = plan.size
    destination.parent.mkdir(parents=True, exist_ok=True)
    require_space(destination, destination.parent, size)
    with _unfinished(destination, Path(src)) as (path, target):
        shifted = _write(plan, target, jobs, lambda n: progress("write", n, size))
        if stamp_of(plan.header.path) != plan.stamp:
            raise CheckpointError(f"{src}: has changed while it was read; nothing was written. Run it again.")
        report = _report(plan, dst, shifted, size)
        if verify:
            report = _verified(report, plan, path, jobs, progress)
        if sync:
            os.fsync(target)
        _publish(path, destination, sync=sync)
    return replace(report, seconds=time.monotonic() - begin)


def prepare_gguf(
    src: str | Path, dst: str | Path, options: ConvertOptions, *, jobs: int | None, progress: Progress
) -> tuple[Path, GgufPlan]:
    """(DST without links, the plan): everything that is decided before a byte is written.

    Raises:
        UsageError: options that GGUF has no place for, or a DST of another kind.
        DestinationError: something is at DST.
        UnsupportedError: SRC is no GGUF file.
    """
    given = {"layout": options.layout != DEFAULT_LAYOUT, "source_id": options.source_id is not None}
    refuse_options(given | only_scaled(options), _WHY)
    if not is_gguf(src):
        raise UnsupportedError(
            f"{src}: a GGUF file also holds hyperparameters and a vocabulary, which llama.cpp's converter writes. For "
            f"gpt-oss, DeepSeek-V4 and Kimi-K3: python convert_hf_to_gguf.py {src} --outfile MXFP4.gguf, then fp4cast "
            f"convert MXFP4.gguf {dst}. For others: fp4cast convert {src} NVFP4, then python convert_hf_to_gguf.py "
            f"NVFP4 --outfile {dst}. At last fp4cast verify {src} {dst} compares every value"
        )
    destination = real_path(dst)
    if destination.suffix.lower() != SUFFIX:
        raise UsageError(f"{dst}: a GGUF file becomes a GGUF file; name one that ends in {SUFFIX}")
    _check_free(destination)
    return destination, make_plan(Path(src), jobs=jobs, progress=lambda n, total: progress("scan", n, total))


def _check_free(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise DestinationError(
            f"{destination}: exists. A GGUF file has no receipt that would say who wrote it, so none is replaced: "
            "delete it, or name another one"
        )


@contextmanager
def _unfinished(destination: Path, source: Path) -> Iterator[tuple[Path, int]]:
    """(path, descriptor) of the file in a locked working directory that is to become DST; both go at the end."""
    lock, state = enter(source, destination, shared=False), state_of(destination)
    path = state / "out" / destination.name
    try:
        _check_free(destination)
        with created(path, source.stat().st_mode & 0o666 | 0o600) as target:
            yield path, target
    except OSError as error:
        raise DestinationError(f"{error.filename or destination}: {error.strerror or error}") from error
    finally:
        remove(state)  # while the lock holds others off
        lock.release()


def _publish(path: Path, destination: Path, *, sync: bool) -> None:
    """Give the file its name; what has come to lie there meanwhile stays."""
    try:
        destination.hardlink_to(path)
    except FileExistsError:
        _check_free(destination)
        raise
    except OSError:  # a file system without hard links
        _check_free(destination)
        path.rename(destination)
    if sync:
        sync_path(destination.parent)


def _write(plan: GgufPlan, target: int, jobs: int | None, progress: Advance) -> int:
    """Write the whole file; returns the number of shifted half-blocks."""
    outputs = plan.outputs()
    head = plan.head(outputs)
    shifted = 0
    with File(plan.header.path) as file, workers(jobs, progress) as pool:
        _put(target, 0, np.frombuffer(head, np.uint8), pool)
        for tensor, made_of in outputs:
            at = len(head) + tensor.start
            match made_of:
                case Recast():
                    shifted += _write_cast(made_of, file, target, at, pool)
                case GgufTensor():
                    copy_range(file, made_of.start, target, at, tensor.nbytes, pool.advance)
                case data:
                    _put(target, at, data, pool)
            padding = plan.header.pad(tensor.nbytes) - tensor.nbytes
            _put(target, at + tensor.nbytes, np.zeros(padding, np.uint8), pool)
    return shifted


def _write_cast(recast: Recast, file: File, target: int, at: int, pool: Workers) -> int:
    def chunks() -> Iterator[tuple[GgufBlocks, Scaling, int, int, int]]:
        begin = 0
        for blocks, domain in zip(recast.blocks(file), recast.domains, strict=True):
            for first, last in spans(0, blocks.count, CHUNK_BLOCKS):
                yield blocks, domain.scaling, first, last, at + (begin + first) // 2 * layout.NVFP4_BYTES
            begin += blocks.count

    return sum(pool.map(partial(_write_chunk, target, pool), chunks()))


def _write_chunk(target: int, pool: Workers, chunk: tuple[GgufBlocks, Scaling, int, int, int]) -> int:
    blocks, scaling, first, last, at = chunk
    records = blocks.records(first, last)
    encoded = encode(halves(records), records[:, 0].copy(), scaling)
    _put(target, at, super_blocks(encoded.codes, encoded.block_scales), pool)
    return encoded.shifted


def _put(target: int, at: int, data: Bytes, pool: Workers) -> None:
    write_all(target, at, np.ascontiguousarray(data))
    pool.advance(data.nbytes)


def _report(plan: GgufPlan, dst: str | Path, shifted: int, size: int) -> Report:
    half_blocks = sum(recast.tensor.nbytes for recast in plan.recasts.values()) // layout.MXFP4_BYTES * 2
    counts: HalfBlockCounts = {"verbatim": half_blocks - shifted, "shifted": shifted, "rounded": 0}
    read = plan.header.size + sum(recast.tensor.nbytes for recast in plan.recasts.values())
    return gguf_report(
        str(plan.header.path),
        str(dst),
        cast=len(plan.recasts),
        copied=plan.copied,
        half_blocks=counts,
        bytes={"read": read, "written": size},
        notes=plan.notes(),
    )


def _verified(report: Report, plan: GgufPlan, path: Path, jobs: int | None, progress: Progress) -> Report:
    found = verify_gguf(plan.header.path, path, jobs=jobs, progress=lambda n, total: progress("verify", n, total))
    if not found.ok:
        raise unlike(report.destination, report.source, found.differences)
    return replace(found, destination=report.destination, serve=report.serve, bytes=report.bytes, notes=report.notes)


def preview_gguf(
    src: str | Path, dst: str | Path, options: ConvertOptions, *, jobs: int | None, progress: Progress
) -> tuple[GgufPlan, int]:
    """(the plan, bytes of the new file): what `convert_gguf` would do.

    Raises:
        Fp4CastError: what it would raise before it writes.
    """
    destination, plan = prepare_gguf(src, dst, options, jobs=jobs, progress=progress)
    plan.require_exact()
    there = next(path for path in destination.parents if path.exists())
    require_space(destination, there, plan.size)
    return plan, plan.size
