"""Converting a checkpoint: plan, run, verify, and only then let the destination appear."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fp4cast import __version__
from fp4cast.checkpoint import CONFIG, INDEX, RECEIPT, open_checkpoint
from fp4cast.configs import to_bytes
from fp4cast.errors import CheckpointError, DestinationError, VerificationError
from fp4cast.hub import resolve
from fp4cast.inputs import InputScalesLike
from fp4cast.plan import Plan, make_plan, stamp
from fp4cast.report import InexactTensor, Report, digest, digest_bytes, inexact_tensor
from fp4cast.run import Tallies, run
from fp4cast.staging import Staging, check_destination, staging
from fp4cast.verify import verify_checkpoint

__all__ = ["convert"]

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
    source, destination = resolve(src), real_path(dst)
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
    with staging(source, destination, overwrite=overwrite) as stage:
        stage.adopt(plan.fingerprint, resume=resume)
        stage.check_space(plan.write_bytes)
        total = plan.write_bytes
        tallies = run(plan, stage.out, state=stage.state, jobs=jobs, progress=lambda n: progress("write", n, total))
        _check_unchanged(plan)
        report = _report(plan, str(dst), tallies)
        _write_documents(plan, stage)
        _write_receipt(plan, stage, report)
        if verify:
            report = _verified(source, stage, report, jobs, lambda n, of: progress("verify", n, of))
        stage.publish(overwrite=overwrite)
    return replace(report, seconds=time.monotonic() - begin)


def real_path(path: str | Path) -> Path:
    """A path without links, whose last part need not exist.

    Raises:
        DestinationError: links in a circle, or a name that no file system takes.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DestinationError(f"{str(path)[:200]}: is no usable path: {error}") from error


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


def _write_documents(plan: Plan, stage: Staging) -> None:
    """Everything beside the shards; config.json waits outside."""
    for name, data in plan.documents.items():
        (stage.out / (stage.config if name == CONFIG else name)).write_bytes(data)
    for companion in plan.companions:
        (stage.out / companion).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.source.checkpoint.path / companion, stage.out / companion)


def _write_receipt(plan: Plan, stage: Staging, report: Report) -> None:
    """fp4cast.json: what was made, and the digests by which rounded tensors are recognised. The same on every run."""
    rounded_or_w4a4 = report.inexact or plan.target.activations == "w4a4"
    written = open_checkpoint(stage.out, stage.config).tensors if rounded_or_w4a4 else {}
    digests: dict[str, str] = {}
    for tensor in report.inexact:
        names = plan.target.names(tensor.name)
        digests[tensor.name] = digest([written[names.codes], written[names.block_scale], written[names.tensor_scale]])
    facts = {key: value for key, value in report.facts().items() if key != "marlin_exact"}  # measured only by verify
    receipt: dict[str, Any] = {"fp4cast": __version__, **facts, "digests": digests}
    receipt["documents"] = {name: digest_bytes(data) for name, data in sorted(plan.documents.items()) if name != INDEX}
    if plan.target.activations == "w4a4":
        modules = (pair.module for domain in plan.domains for pair in domain.pairs)
        receipt["input_scales"] = digest([written[plan.target.names(module).input_scale] for module in sorted(modules)])
    (stage.out / RECEIPT).write_bytes(to_bytes(receipt))


def _verified(
    source: Path,
    stage: Staging,
    report: Report,
    jobs: int | None,
    progress: Callable[[int, int], None],
) -> Report:
    found = verify_checkpoint(source, stage.out, config=stage.config, jobs=jobs, progress=progress)
    if not found.ok:
        stage.forget_shards()
        shown = "\n".join(f"  {difference}" for difference in found.differences[:10])
        raise VerificationError(
            f"{report.destination}: what was written differs from {source} in {len(found.differences)} places; "
            f"nothing was published:\n{shown}"
        )
    return replace(found, destination=report.destination, bytes=report.bytes)


def _report(plan: Plan, destination: str, tallies: Tallies) -> Report:
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
        destination=destination,
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
        marlin_exact=all(domain.marlin_exact for domain in plan.domains),
        bytes={"read": plan.read_bytes, "written": plan.write_bytes},
        seconds=0.0,
        verified=False,
        served=plan.target.served,
    )
