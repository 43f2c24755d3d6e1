"""Convert a checkpoint: plan, write, verify, and only then publish the destination."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fp4cast.checkpoints.gguf_file import names_gguf
from fp4cast.conversion.complete import check_resumption, complete_or_write, may_be_complete
from fp4cast.conversion.destination import check_place, real_path
from fp4cast.conversion.direction import find_direction
from fp4cast.conversion.early import Early
from fp4cast.conversion.execute import execute
from fp4cast.conversion.input_scales import InputScalesLike
from fp4cast.conversion.plan import ConvertOptions, Plan, check_unchanged, make_plan
from fp4cast.conversion.publish import finished, publish
from fp4cast.conversion.staging import Staging, staging
from fp4cast.hub.resolve import resolve
from fp4cast.layouts.choose import DEFAULT_LAYOUT
from fp4cast.layouts.mlx import MLX
from fp4cast.parallel.engines import Engine, make_engine
from fp4cast.parallel.progress import Progress, ignore
from fp4cast.verification.report import Report

LOG = logging.getLogger(__name__)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    layout: str = DEFAULT_LAYOUT,
    activations: str | None = None,
    input_scales: InputScalesLike | None = None,
    inexact: str = "fail",
    kv_cache_qformat: str = "none",
    jobs: int | None = None,
    engine: str = "local",
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    sync: bool = True,
    card: bool = True,
    source_id: str | None = None,
    stream: bool = False,
    to: str = "nvfp4",
    fp8: str = "none",
    progress: Progress = ignore,
) -> Report:
    """Convert an MXFP4 checkpoint into an NVFP4 one, or back.

    What an interrupted run of the same source and options has finished is kept. Where `dst` is complete already, every
    value of it is compared, and nothing is written.

    Args:
        src: a directory, a Hugging Face model id, or a GGUF file.
        dst: the directory to make, or the GGUF file.
        layout: "modelopt" or "compressed-tensors"; "mlx" for a source in MLX's mxfp4, which stays one of MLX.
        activations: "w4a16" or "w4a4"; None for w4a16 where the family can be served so.
        input_scales: for w4a4: a number (the input_scale of every projection), or a mapping or file (JSON,
            safetensors) of projection name -> amax of its input.
        inexact: "fail" stops before a byte is written when a domain is not exact; "nearest" rounds there.
        kv_cache_qformat: "none", or "fp8_cast" for a KV cache in FP8 with scales of 1.
        jobs: threads; None for one a core. 1 works in the caller's own thread; 4 and more share 2 GiB and more among
            processes, see docs/performance.md.
        engine: "local" for this machine, or "ray" for the tasks of a Ray cluster, with `jobs` threads each.
        resume: refuse to begin anew where an interrupted conversion had another source or other options.
        restart: begin anew, whatever an interrupted conversion has finished.
        overwrite: replace an existing `dst`, once the new one is complete.
        verify: read everything again and compare every value before `dst` is published.
        sync: wait until everything is on the disk before `dst` is published: a power cut then loses nothing.
        card: write a model card, README.md, with a picture; the source's then lies beside it as README.source.md.
        source_id: the source's id on the Hub, ORG/NAME or ORG/NAME@REVISION, for the card and the receipt, where `src`
            does not say it.
        stream: of a model on the Hub, have only the shards on the disk that are being converted.
        to: "nvfp4", or "mxfp4" for the way back: an NVFP4 checkpoint all of whose weights are MXFP4 values becomes the
            MXFP4 one that it was cast from; no other option of the format goes with it.
        fp8: "none", or "attention" to quantize attention, which is BF16, to FP8 in blocks of 128 x 128: not exact, and
            measured; `report.fp8` has the SNR of each weight.
        progress: called, from worker threads, with (phase, bytes just done, total bytes or 0).

    Returns:
        What was done, with figures measured on the written files (while writing them, without `verify`).

    Raises:
        Fp4CastError: see `fp4cast.errors`; `dst` is as it was before.
    """
    options = ConvertOptions(layout, activations, input_scales, inexact, kv_cache_qformat, card, source_id, to, fp8)
    return way_of(stream)(
        src,
        dst,
        options,
        jobs=jobs,
        engine=engine,
        resume=resume,
        restart=restart,
        overwrite=overwrite,
        verify=verify,
        sync=sync,
        progress=progress,
    )


def way_of(stream: bool) -> Callable[..., Report]:
    """The function that converts: `convert_checkpoint`, or with `stream` the one that downloads shard by shard."""
    if not stream:
        return convert_checkpoint
    from fp4cast.conversion.streaming import convert_streamed  # and what reads from the Hub

    return convert_streamed


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    options: ConvertOptions,
    *,
    jobs: int | None,
    engine: str,
    resume: bool,
    restart: bool,
    overwrite: bool,
    verify: bool,
    sync: bool,
    progress: Progress,
) -> Report:
    """Like `convert`, with its options in one object."""
    if (unscaled := _unscaled(src, dst, options)) is not None:
        others = {"engine": engine != "local", "resume": resume, "restart": restart, "overwrite": overwrite}
        return unscaled(src, dst, options, jobs=jobs, verify=verify, sync=sync, progress=progress, **others)
    begin, worker = time.monotonic(), make_engine(engine, jobs)
    check_resumption(resume=resume, restart=restart)
    destination, plan = prepare(src, dst, options, jobs=jobs, progress=progress)
    look = may_be_complete(plan, destination, resume=resume, restart=restart, overwrite=overwrite)

    def write() -> Report:
        with staging(plan.source.checkpoint.path, destination, overwrite=overwrite, sync=sync) as stage:
            stage.adopt(plan.fingerprint, resume=resume, restart=restart)
            stage.check_space(plan.sizes)
            return _write(
                plan, stage, str(dst), worker, verify=verify, overwrite=overwrite, sync=sync, progress=progress
            )

    report = complete_or_write(plan, destination, worker, write, look=look, overwrite=overwrite, progress=progress)
    return finished(plan, report, dst, time.monotonic() - begin)


def _write(
    plan: Plan,
    stage: Staging,
    destination: str,
    engine: Engine,
    *,
    verify: bool,
    overwrite: bool,
    sync: bool,
    progress: Progress,
) -> Report:
    """Write all shards, and publish DST."""
    total = plan.write_bytes
    early = Early.of(plan, stage, engine, partial(progress, "verify")) if verify else None
    shards = execute(
        plan.shards,
        stage.out,
        fingerprint=plan.fingerprint,
        state=stage.state,
        engine=engine,
        sync=sync,
        progress=lambda n: progress("write", n, total),
        follow=early,
    )
    check_unchanged(plan)
    look = early.judge if early else None
    return publish(
        plan,
        stage,
        shards,
        destination,
        engine=engine,
        verify=verify,
        overwrite=overwrite,
        progress=progress,
        look=look,
    )


def _unscaled(src: str | Path, dst: str | Path, options: ConvertOptions) -> Callable[..., Report] | None:
    """What converts into a format without a tensor scale: a GGUF file, or MLX's layout; None for all others."""
    if names_gguf(src, dst):
        from fp4cast.conversion.gguf import convert_gguf

        return convert_gguf
    if options.layout != MLX:
        return None
    from fp4cast.conversion.mlx import convert_mlx

    return convert_mlx


def _planner(options: ConvertOptions) -> Callable[..., Plan]:
    """What plans in the direction that is asked for."""
    if find_direction(options.to) == "nvfp4":
        return make_plan
    from fp4cast.conversion.way_back import plan_way_back

    return plan_way_back


def prepare(
    src: str | Path, dst: str | Path, options: ConvertOptions, *, jobs: int | None, progress: Progress
) -> tuple[Path, Plan]:
    """(DST without links, the plan): everything that is decided before a byte is written; arguments as in `convert`."""
    source, destination = resolve(src), real_path(dst)
    check_place(source, destination)
    plan = _planner(options)(source, options, jobs=jobs, progress=lambda n, total: progress("scan", n, total))
    LOG.info(
        "%s: %s; %d tensors to cast in %d scale domains, %d of them exact; as %s %s",
        source,
        plan.source.family.title,
        len(plan.selection.cast),
        len(plan.domains),
        sum(domain.exact for domain in plan.domains),
        plan.target.layout.name,
        plan.target.activations,
    )
    for domain in plan.domains:
        LOG.debug("%s: %s", domain.name, domain.scaling)
    return destination, plan
