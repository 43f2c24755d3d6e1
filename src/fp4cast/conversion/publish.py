"""From written shards to a destination: documents, receipt, verification, and the rename that lets it appear."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from fp4cast import __version__
from fp4cast.checkpoints.directory import CONFIG, INDEX, RECEIPT, open_checkpoint
from fp4cast.conversion.plan import Plan
from fp4cast.conversion.staging import Staging
from fp4cast.conversion.writer import Tallies
from fp4cast.errors import VerificationError
from fp4cast.layouts.documents import to_bytes
from fp4cast.parallel.engines import Engine
from fp4cast.verification.report import InexactTensor, Report, digest, digest_bytes, inexact_tensor
from fp4cast.verification.verify import verify_checkpoint

__all__ = ["Progress", "complete", "write_documents"]

Progress = Callable[[str, int, int], None]  # (phase, bytes just done, bytes in all)


def complete(
    plan: Plan,
    stage: Staging,
    tallies: Tallies,
    destination: str,
    *,
    engine: Engine,
    verify: bool,
    overwrite: bool,
    progress: Progress,
) -> Report:
    """Let a destination whose shards are written appear.

    Args:
        plan: what was written.
        stage: where.
        tallies: what was measured while writing.
        destination: its name, for the report.
        engine: who verifies.
        verify: compare every value first.
        overwrite: replace what is there.
        progress: see `convert`.

    Raises:
        VerificationError: a value differs; nothing appears, and the next run writes every shard again.
    """
    report = _report(plan, destination, tallies)
    write_documents(stage, plan.documents, plan.companions, plan.source.checkpoint.path)
    _write_receipt(plan, stage, report)
    if verify:
        report = _verified(plan, stage, report, engine, lambda n, of: progress("verify", n, of))
    stage.publish(overwrite=overwrite)
    return report


def write_documents(
    stage: Staging, documents: Mapping[str, bytes], companions: Iterable[PurePosixPath], source: Path
) -> None:
    """Everything beside the shards; config.json waits outside.

    Args:
        stage: where.
        documents: bytes by file name.
        companions: files to carry along, relative to the source.
        source: its directory.
    """
    for name, data in documents.items():
        (stage.out / (stage.config if name == CONFIG else name)).write_bytes(data)
    for companion in companions:
        (stage.out / companion).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / companion, stage.out / companion)


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
    plan: Plan,
    stage: Staging,
    report: Report,
    engine: Engine,
    progress: Callable[[int, int], None],
) -> Report:
    source = plan.source.checkpoint.path
    found = verify_checkpoint(source, stage.out, engine=engine, config=stage.config, progress=progress)
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
