"""Converting a checkpoint so that no moment of it can hurt: everything is staged beside DST and renamed at the end.

The staging directory `.DST.fp4cast` holds finished shards; `.DST.fp4cast/.state` holds what is unfinished, the lock and
the fingerprint of the plan. config.json, without which no engine loads a directory, moves in last, after verification.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fp4cast import __version__
from fp4cast.checkpoint import CONFIG, RECEIPT, open_checkpoint
from fp4cast.configs import to_bytes
from fp4cast.errors import CheckpointError, DestinationError, Fp4CastError, VerificationError
from fp4cast.hub import resolve
from fp4cast.inputs import InputScalesLike
from fp4cast.plan import Plan, make_plan, stamp
from fp4cast.report import InexactTensor, Report, digest, inexact_tensor
from fp4cast.run import Tallies, run
from fp4cast.verify import verify_checkpoint

__all__ = ["convert"]

STATE = ".state"
FREE_MARGIN = 64 << 20

Progress = Callable[[str, int, int], None]  # (phase, bytes just done, bytes in all)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    layout: str = "modelopt",
    activations: str | None = None,
    input_scales: InputScalesLike | None = None,
    inexact: str = "fail",
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = lambda *_: None,
) -> Report:
    """Convert an MXFP4 checkpoint into an NVFP4 one.

    Args:
        src: a directory, or a Hugging Face model id.
        dst: the directory to make.
        layout: "modelopt" or "compressed-tensors".
        activations: "w4a16" or "w4a4"; None for w4a16 where the family can be served so.
        input_scales: for w4a4: a number (the input_scale of every projection), or a mapping or file (JSON,
            safetensors) of projection name -> amax of its input.
        inexact: "fail" stops before a byte is written when a domain is not exact; "nearest" rounds there.
        jobs: threads; None for one a core.
        resume: go on with an interrupted conversion of the same source and options.
        overwrite: replace an existing `dst`, once the new one is complete.
        verify: read everything again and compare every value before `dst` appears.
        progress: called, from worker threads, with (phase, bytes just done, bytes in all or 0).

    Returns:
        What was done, measured on what was written.

    Raises:
        Fp4CastError: see `fp4cast.errors`; `dst` is as it was before.
    """
    begin = time.monotonic()
    source, destination = resolve(src), Path(dst)
    check_destination(source, destination, overwrite=overwrite)
    plan = make_plan(
        source,
        layout=layout,
        activations=activations,
        input_scales=input_scales,
        inexact=inexact,
        jobs=jobs,
        progress=lambda n, total: progress("scan", n, total),
    )
    with _staging(destination, plan, resume=resume) as staging:
        state = staging / STATE
        _check_space(staging, plan)
        written = plan.write_bytes
        tallies = run(plan, staging, state=state, jobs=jobs, progress=lambda n: progress("write", n, written))
        _check_unchanged(plan)
        report = _report(plan, destination, tallies, time.monotonic() - begin)
        _write_documents(plan, staging)
        _write_receipt(plan, staging, report)
        if verify:
            report = _verified(
                source, destination, staging, report, jobs, lambda n, total: progress("verify", n, total)
            )
        (state / CONFIG).replace(staging / CONFIG)
        _publish(staging, destination, overwrite=overwrite)
    return replace(report, seconds=time.monotonic() - begin)


def check_destination(source: Path, destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination that would mix with the source or cost the user something.

    Raises:
        DestinationError: with what is there and what to pass.
    """
    a, b = source.resolve(), destination.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise DestinationError(f"{destination}: must lie apart from the source {source}")
    if destination.exists() and not destination.is_dir():
        raise DestinationError(f"{destination}: exists and is no directory")
    if destination.exists() and any(destination.iterdir()) and not overwrite:
        raise DestinationError(f"{destination}: exists and is not empty; pass --overwrite to replace it")


@contextmanager
def _staging(destination: Path, plan: Plan, *, resume: bool) -> Iterator[Path]:
    """The staging directory, locked against a second writer; kept when something fails, for --resume."""
    staging = destination.absolute().parent / f".{destination.name}.fp4cast"
    state = staging / STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise DestinationError(f"{staging}: cannot be created: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DestinationError(f"{destination}: another fp4cast is writing it ({staging})") from error
        _adopt(staging, state, plan, resume=resume)
        try:
            yield staging
        except Fp4CastError as error:
            error.add_note(f"What is finished lies in {staging}: --resume goes on from there; or delete it.")
            raise
    finally:
        os.close(lock)


def _adopt(staging: Path, state: Path, plan: Plan, *, resume: bool) -> None:
    """Take over what an earlier run left if it is of this plan; start afresh otherwise."""
    mark = state / "plan"
    before = mark.read_text() if mark.exists() else None
    if resume and before is not None and before != plan.fingerprint:
        raise DestinationError(
            f"{staging}: holds an unfinished conversion with other options, or of a source that has changed; "
            "run without --resume to start afresh"
        )
    if not resume or before is None:
        for path in [*staging.iterdir(), *state.iterdir()]:
            if path not in (state, state / "lock"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    mark.write_text(plan.fingerprint)


def _check_space(staging: Path, plan: Plan) -> None:
    there = sum(path.stat().st_size for path in staging.iterdir() if path.is_file())
    needed, free = plan.write_bytes + FREE_MARGIN - there, shutil.disk_usage(staging).free
    if needed > free:
        raise DestinationError(
            f"{staging.parent}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; nothing was written"
        )


def _check_unchanged(plan: Plan) -> None:
    try:
        now: Any = stamp(plan.source)
    except OSError as error:
        now = error
    if now != plan.stamps:
        raise CheckpointError(
            f"{plan.source.checkpoint.path}: a shard changed while it was converted; nothing was published. "
            "Wait until its download or copy is finished and convert again."
        )


def _write_documents(plan: Plan, staging: Path) -> None:
    """Everything beside the shards; config.json waits in the state directory."""
    try:
        for name, data in plan.documents.items():
            (staging / STATE / name if name == CONFIG else staging / name).write_bytes(data)
        for companion in plan.companions:
            (staging / companion).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plan.source.checkpoint.path / companion, staging / companion)
    except OSError as error:
        raise DestinationError(f"{staging}: cannot be written: {error.strerror}") from error


def _write_receipt(plan: Plan, staging: Path, report: Report) -> None:
    """fp4cast.json: what was made, and the digests by which rounded tensors are recognised. The same on every run."""
    written = open_checkpoint(staging, f"{STATE}/{CONFIG}").tensors
    digests: dict[str, str] = {}
    for tensor in report.inexact:
        names = plan.target.names(tensor.name)
        digests[tensor.name] = digest([written[names.codes], written[names.block_scale], written[names.tensor_scale]])
    receipt: dict[str, Any] = {"fp4cast": __version__, **report.facts(), "digests": digests}
    if plan.target.activations == "w4a4":
        modules = (pair.module for domain in plan.domains for pair in domain.pairs)
        receipt["input_scales"] = digest([written[plan.target.names(module).input_scale] for module in sorted(modules)])
    (staging / RECEIPT).write_bytes(to_bytes(receipt))


def _verified(
    source: Path,
    destination: Path,
    staging: Path,
    report: Report,
    jobs: int | None,
    progress: Callable[[int, int], None],
) -> Report:
    found = verify_checkpoint(source, staging, config=f"{STATE}/{CONFIG}", jobs=jobs, progress=progress)
    if not found.ok:
        shown = "\n".join(f"  {difference}" for difference in found.differences[:10])
        raise VerificationError(
            f"{destination}: what was written differs from {source} in {len(found.differences)} places; "
            f"nothing was published:\n{shown}"
        )
    return replace(found, destination=report.destination, bytes=report.bytes)


def _publish(staging: Path, destination: Path, *, overwrite: bool) -> None:
    """Rename the staging directory to DST; an older DST goes only when the new one stands."""
    shutil.rmtree(staging / STATE)
    old = destination.absolute().parent / f".{destination.name}.fp4cast-old"
    try:
        if destination.exists():
            if overwrite:
                shutil.rmtree(old, ignore_errors=True)
                destination.rename(old)
            else:
                destination.rmdir()
        staging.rename(destination)
    except OSError as error:
        raise DestinationError(f"{destination}: cannot be put in place: {error.strerror}; see {staging}") from error
    shutil.rmtree(old, ignore_errors=True)


def _report(plan: Plan, destination: Path, tallies: Tallies, seconds: float) -> Report:
    """The report of a run, by the figures measured while writing."""
    elements = {pair.module: pair.elements for domain in plan.domains for pair in domain.pairs}
    inexact: list[InexactTensor] = [
        inexact_tensor(name, t.rounded, elements[name], t.squared_error, t.max_error, t.energy)
        for name, t in tallies.items()
        if t.rounded
    ]
    shifted, rounded = sum(t.shifted for t in tallies.values()), sum(t.rounded for t in tallies.values())
    cast = len(elements)
    return Report(
        source=str(plan.source.checkpoint.path),
        destination=str(destination),
        family=plan.source.family.name,
        layout=plan.target.layout,
        activations=plan.target.activations,
        exact=not inexact,
        tensors={"cast": cast, "exact": cast - len(inexact), "inexact": len(inexact), "copied": plan.copied},
        half_blocks={
            "verbatim": sum(elements.values()) // 16 - shifted - rounded,
            "shifted": shifted,
            "rounded": rounded,
        },
        inexact=inexact,
        marlin_exact=all(domain.scaling.marlin_exact for domain in plan.domains),
        bytes={"read": plan.read_bytes, "written": plan.write_bytes},
        seconds=seconds,
        verified=False,
        served=plan.target.served,
    )
