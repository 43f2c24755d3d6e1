"""Recognise a destination that is complete already: what is finished is said, not done again."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.directory import RECEIPT
from fp4cast.conversion.plan import Plan
from fp4cast.conversion.recipe import Constant, OutputShard
from fp4cast.conversion.staging import GuidedError
from fp4cast.conversion.working_directory import enter, plan_of, remove, state_of, sweep
from fp4cast.errors import CheckpointError, DestinationError, UsageError
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import Progress
from fp4cast.verification.figures import Fp8Tensor, InexactTensor
from fp4cast.verification.report import HalfBlockCounts, Report
from fp4cast.verification.verify import verify_checkpoint

_INEXACT = ("name", "rounded_half_blocks", "max_abs_error", "mse", "snr_db")  # the fields of an InexactTensor


def complete_or_write(
    plan: Plan,
    destination: Path,
    engine: Engine,
    write: Callable[[], Report],
    *,
    look: bool,
    overwrite: bool,
    progress: Progress,
) -> Report:
    """The report on a destination that is complete already, or else of writing it.

    Another run of the same plan may be faster meanwhile; then the destination is looked at once more.

    Args:
        plan: the plan.
        destination: DST.
        engine: runs the comparison.
        write: writes the destination.
        look: whether it may be complete already.
        overwrite: see `complete`.
        progress: see `convert`.

    Raises:
        Fp4CastError: see `convert`.
    """
    found = partial(complete, plan, destination, engine, overwrite=overwrite, progress=progress)
    if look and (done := found()):
        return done
    absent = not destination.exists() and not (state_of(destination) / "old").exists()
    try:
        return write()
    except GuidedError:
        raise
    except DestinationError:
        if look and absent and (done := found()):
            return done
        raise


def complete(plan: Plan, destination: Path, engine: Engine, *, overwrite: bool, progress: Progress) -> Report | None:
    """The report on a destination that a plan has written already, every value compared; None if there is none.

    What a run that was killed right after it published DST has left is removed.

    Args:
        plan: the plan.
        destination: DST.
        engine: runs the comparison.
        overwrite: a destination that differs may be written again, also where only a companion does.
        progress: see `convert`.

    Raises:
        DestinationError: the destination is damaged, and must not be written again.
    """
    if not looks_complete(plan, destination):
        return None
    source = plan.source.checkpoint.path
    report = verify_checkpoint(source, destination, engine=engine, progress=lambda n, of: progress("verify", n, of))
    if overwrite and report.differences:
        return None
    if not report.ok:
        raise DestinationError(
            f"{destination}: was written with these options, but {len(report.differences)} things differ, the first is "
            f"{report.differences[0]}; pass --overwrite to write it again"
        )
    _remove_left(plan, destination)
    return replace(report, notes=[*report.notes, "it was complete already, and has been compared; nothing was written"])


def as_noted(plan: Plan, destination: Path, jobs: int | None, *, overwrite: bool, progress: Progress) -> Report | None:
    """Like `complete`, by the receipt: the values of the source are not on this machine."""
    if not looks_complete(plan, destination):
        return None
    from fp4cast.verification.files import verify_files

    found = verify_files(destination, jobs=jobs, progress=lambda n, of: progress("check", n, of))
    if overwrite and found.differences:
        return None
    if wrong := found.damage:
        raise DestinationError(
            f"{destination}: was written with these options, but files are not as they were written: {len(wrong)}, the "
            f"first is {wrong[0]}; pass --overwrite to write it again"
        )
    _remove_left(plan, destination)
    return _noted(plan, destination, found.facts)


def _noted(plan: Plan, destination: Path, facts: Mapping[str, Any]) -> Report:
    """The report that a receipt makes."""
    try:
        counts = {name: int(facts["half_blocks"][name]) for name in ("verbatim", "shifted", "rounded")}
        inexact = [InexactTensor(*(each[name] for name in _INEXACT)) for each in facts["inexact"]]
        fp8 = [Fp8Tensor(str(each["name"]), _decibels(each["snr_db"])) for each in facts.get("fp8", ())]
    except (LookupError, TypeError, ValueError) as error:
        raise DestinationError(
            f"{destination / RECEIPT}: does not say what was made; pass --overwrite to write {destination} again"
        ) from error
    return Report.of(
        plan.source,
        plan.target,
        plan.selection,
        str(destination),
        half_blocks=cast(HalfBlockCounts, counts),
        inexact=inexact,
        marlin_exact=all(domain.marlin_exact for domain in plan.domains),
        bytes={"read": 0, "written": 0},
        fp8=fp8,
        notes=["it was complete already, and its files are as they were written; nothing was downloaded or written"],
    )


def _decibels(value: float | None) -> float:
    return math.inf if value is None else float(value)


def looks_complete(plan: Plan, destination: Path) -> bool:
    """Whether documents, headers and scalars are the plan's."""
    try:
        return (
            (destination / RECEIPT).is_file()
            and all(_holds(destination / name, data) for name, data in plan.documents.items())
            and all(_looks_written(shard, destination / shard.file) for shard in plan.shards)
        )
    except (OSError, CheckpointError):
        return False


def check_resumption(*, resume: bool, restart: bool) -> None:
    """Raise a UsageError for a run that shall go on and begin anew."""
    if resume and restart:
        raise UsageError("--resume goes on with what is finished, --restart begins anew: pass one")


def may_be_complete(plan: Plan, destination: Path, *, resume: bool, restart: bool, overwrite: bool) -> bool:
    """Whether a run should look for a destination that it has nothing to add to."""
    return not restart and (resume or not overwrite or marked(plan, destination))


def marked(plan: Plan, destination: Path) -> bool:
    """Whether the working directory holds what a run of the same plan has left."""
    return plan_of(state_of(destination)) == plan.fingerprint


def _holds(path: Path, data: bytes) -> bool:
    """Whether this is a regular file of these contents; nothing else is opened."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_size == len(data) and path.read_bytes() == data


def _looks_written(shard: OutputShard, path: Path) -> bool:
    """Whether a file has a shard's size, header and scalars."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    with File(path, follow=False, wait=False) as file:
        if os.fstat(file.fd).st_size != shard.layout.size:
            return False
        known = [(0, shard.layout.header)] + [
            (shard.layout.offsets[output.name], output.step.data)
            for output in shard.outputs
            if isinstance(output.step, Constant)
        ]
        return all(file.read(start, len(data)).tobytes() == data for start, data in known)


def _remove_left(plan: Plan, destination: Path) -> None:
    sweep(destination)
    if marked(plan, destination):
        lock = enter(plan.source.checkpoint.path, destination, shared=False)
        try:
            if lock.alone():
                remove(state_of(destination))
        finally:
            lock.release()
