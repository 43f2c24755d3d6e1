"""Converting a checkpoint: plan, run, verify, and only then let the destination appear."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.hub import resolve
from fp4cast.conversion.execute import run
from fp4cast.conversion.input_scales import InputScalesLike
from fp4cast.conversion.plan import Plan, check_unchanged, make_plan
from fp4cast.conversion.publish import Progress, complete
from fp4cast.conversion.staging import check_destination, staging
from fp4cast.errors import DestinationError
from fp4cast.parallel.engines import make_engine
from fp4cast.verification.report import Report

__all__ = ["convert"]


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    layout: str = "modelopt",
    activations: str | None = None,
    input_scales: InputScalesLike | None = None,
    inexact: str = "fail",
    jobs: int | None = None,
    engine: str = "local",
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
        jobs: threads; None for one a core. 1 works in the caller's own thread.
        engine: "local" for this machine, or "ray" for the tasks of a Ray cluster, with `jobs` threads each.
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
    doer = make_engine(engine, jobs)
    source, destination, plan = prepare(
        src,
        dst,
        jobs=jobs,
        overwrite=overwrite,
        progress=progress,
        layout=layout,
        activations=activations,
        input_scales=input_scales,
        inexact=inexact,
    )
    with staging(source, destination, overwrite=overwrite) as stage:
        stage.adopt(plan.fingerprint, resume=resume)
        stage.check_space(plan.sizes)
        total = plan.write_bytes
        tallies = run(
            plan.shards,
            stage.out,
            fingerprint=plan.fingerprint,
            state=stage.state,
            engine=doer,
            progress=lambda n: progress("write", n, total),
        )
        check_unchanged(plan)
        report = complete(
            plan, stage, tallies, str(dst), engine=doer, verify=verify, overwrite=overwrite, progress=progress
        )
    return replace(report, seconds=time.monotonic() - begin)


def prepare(
    src: str | Path, dst: str | Path, *, jobs: int | None, overwrite: bool, progress: Progress, **options: Any
) -> tuple[Path, Path, Plan]:
    """(source, destination, plan): everything that is decided before something is written; arguments as for `convert`.

    Raises:
        Fp4CastError: see `fp4cast.errors`.
    """
    source, destination = resolve(src), real_path(dst)
    check_destination(source, destination, overwrite=overwrite)
    plan = make_plan(source, jobs=jobs, progress=lambda n, total: progress("scan", n, total), **options)
    return source, destination, plan


def real_path(path: str | Path) -> Path:
    """A path without links, whose last part need not exist.

    Raises:
        DestinationError: links in a circle, or a name that no file system takes.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DestinationError(f"{str(path)[:200]}: is no usable path: {error}") from error
