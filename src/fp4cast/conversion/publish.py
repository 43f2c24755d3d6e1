"""Turn written shards into a destination: write documents and receipt, verify, and publish with one rename."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from fp4cast.cards.metadata import read_metadata
from fp4cast.cards.subject import Subject
from fp4cast.cards.text import card_files
from fp4cast.checkpoints.card_files import CARD, beside_card
from fp4cast.checkpoints.checksums import Checksum
from fp4cast.checkpoints.directory import CONFIG, QUANT_CONFIG, RECEIPT, open_checkpoint
from fp4cast.checkpoints.json_files import read_json
from fp4cast.checkpoints.left_out import left_out
from fp4cast.conversion.execute import Finished, tallies_of
from fp4cast.conversion.plan import Plan
from fp4cast.conversion.refusals import unlike
from fp4cast.conversion.staging import Staging
from fp4cast.errors import CheckpointError
from fp4cast.formats import NV_BLOCK
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import AdvanceOf, Progress
from fp4cast.verification.figures import Fp8Tensor, InexactTensor, inexact_tensor, signal_to_noise
from fp4cast.verification.kv_cache import kv_scales_digest, kv_scales_of
from fp4cast.verification.original import Original
from fp4cast.verification.receipt import Receipt, input_scales_digest, weight_digest
from fp4cast.verification.report import Report
from fp4cast.verification.verify import verify_checkpoint

LOG = logging.getLogger(__name__)
_MAX_TEXT = 16 << 20  # characters of a receipt: what is longer, people would rather not have


def publish(
    plan: Plan,
    stage: Staging,
    shards: Mapping[str, Finished],
    destination: str,
    *,
    engine: Engine,
    verify: bool,
    overwrite: bool,
    progress: Progress,
    look: Callable[[], Report] | None = None,
) -> Report:
    """Publish a destination whose shards are written.

    Args:
        plan: the plan that was executed.
        stage: the working directory that holds the shards.
        shards: what was noted of each shard, by its file's name.
        destination: its name, for the report.
        engine: runs the verification.
        verify: compare every value first.
        overwrite: replace an existing destination.
        progress: see `convert`.
        look: makes the comparison; None for one of both directories.

    Raises:
        VerificationError: something differs; nothing is published. If weights do, the next run writes all shards again.
    """
    report = _report(plan, destination, shards)
    if plan.back is not None:
        from fp4cast.conversion.proof import announce

        report = announce(plan.back, report)
    files = stage.write_documents(plan.documents, plan.companions, plan.source.checkpoint, place=plan.place)
    files |= {name: shard.checksum for name, shard in shards.items()}
    if plan.card:
        files |= stage.write_documents(_card(plan, stage, report, files), {}, plan.source.checkpoint)
    stage.write_receipt(RECEIPT, _receipt(plan, stage, report, files).to_bytes())
    if verify:
        look = look or partial(_look, plan, stage, engine, lambda n, of: progress("verify", n, of))
        report = _verified(plan, stage, report, look())
    if verify and plan.back is not None:
        from fp4cast.conversion.proof import prove

        report = prove(plan, plan.back, report, engine, lambda n, of: progress("check", n, of))
    LOG.info("%s: %d files, %s", stage.out, len(files) + 1, "compared with the source" if verify else "not read back")
    stage.publish(plan.source.checkpoint.path, overwrite=overwrite)
    LOG.info("%s: published", stage.destination)
    return report


def finished(plan: Plan, report: Report, dst: str | Path, seconds: float) -> Report:
    """The report on a published destination, as the caller calls it; people may have deleted its card since."""
    card = Path(dst) / CARD
    named = str(card) if plan.card and card.is_file() else None
    missing = left_out(plan.source.checkpoint)
    return replace(report, destination=str(dst), seconds=seconds, card=named, left_out=missing)


def _card(plan: Plan, stage: Staging, report: Report, files: Mapping[str, Checksum]) -> dict[str, bytes]:
    """The card and its picture. Verification, which follows, checks the figures, or nothing is published."""
    shards = [shard.file for shard in plan.shards]
    subject = Subject(
        source=plan.source,
        target=plan.target,
        selection=plan.selection,
        domains=plan.domains,
        report=report,
        origin=plan.origin,
        day=plan.day,
        size=sum(files[name].bytes for name in shards),
        files={str(beside_card(name)) for name in plan.companions},
        card=read_metadata(stage.out / beside_card(PurePosixPath(CARD))),
    )
    return card_files(subject)


def _receipt(plan: Plan, stage: Staging, report: Report, files: Mapping[str, Checksum]) -> Receipt:
    """The receipt: what was made, digests of what no source value pins down, checksums of all files."""
    target, modules, w4a4 = plan.target, plan.selection.modules, plan.target.activations == "w4a4"
    scaled = report.inexact or w4a4 or target.kv_cache != "none"
    written = open_checkpoint(stage.out, stage.config).tensors if scaled else {}
    cache = kv_scales_of(target.layout, plan.source.checkpoint.tensors, written)
    digests = {tensor.name: weight_digest(target.names(tensor.name), written) for tensor in report.inexact}
    return Receipt.of(
        report,
        digests=digests,
        input_scales=input_scales_digest(target.form, modules, written) if w4a4 else None,
        kv_scales=kv_scales_digest(cache) if target.kv_cache != "none" else None,
        files=files,
        source=plan.origin,
        original=_original(plan) if plan.back is None else Original(),
    )


def _original(plan: Plan) -> Original:
    """What the way back needs; where exponents alone did not decide, some bytes of a tensor do not come back."""
    checkpoint, scales = plan.source.checkpoint, {pair.scales.dtype for pair in plan.selection.cast}
    if checkpoint.renamed:  # the names that it had do not come back
        return Original()
    headers = {name: shard.digest for name, shard in checkpoint.shards.items()}
    texts = {
        pair.module: text
        for domain in plan.domains
        for pair, text in zip(domain.pairs, domain.outside or ("",) * len(domain.pairs), strict=True)
    }
    outside, lost = (
        {name: text for name, text in texts.items() if text},
        {name for name in texts if texts[name] is None},
    )
    if sum(map(len, outside.values())) > _MAX_TEXT:
        outside, lost = {}, lost | outside.keys()
    config = (checkpoint.path / CONFIG).read_text(encoding="utf-8")
    scale = scales.pop() if len(scales) == 1 else ""
    return Original(config, scale, headers, outside, frozenset(lost), _text(checkpoint.path / QUANT_CONFIG))


def _text(path: Path) -> str:
    """The text of a document; empty where there is none, or something else."""
    try:
        read_json(path)
    except CheckpointError:
        return ""
    return path.read_text(encoding="utf-8")


def _look(plan: Plan, stage: Staging, engine: Engine, progress: AdvanceOf) -> Report:
    source = plan.source.checkpoint.path
    return verify_checkpoint(source, stage.out, engine=engine, config=stage.config, strict=True, progress=progress)


def _verified(plan: Plan, stage: Staging, report: Report, found: Report) -> Report:
    if not found.ok:
        if found.wrong("weights") or any(difference.kind == "header" for difference in found.differences):
            stage.forget_shards()
        raise unlike(report.destination, plan.source.checkpoint.path, found.differences)
    return replace(
        found,
        destination=report.destination,
        serve=report.serve,
        bytes=report.bytes,
        notes=(*report.notes, *found.notes),
    )


def _report(plan: Plan, destination: str, shards: Mapping[str, Finished]) -> Report:
    """The report of a conversion, from figures measured while writing; bytes are those that this run moved."""
    tallies = tallies_of(shards.values())
    written = {name for name, shard in shards.items() if not shard.kept}
    kept = f"{len(shards) - len(written)} of {len(shards)} shards had been finished before, and were kept"
    elements = {pair.module: pair.elements for pair in plan.selection.cast}
    inexact: list[InexactTensor] = [
        inexact_tensor(name, t.rounded, elements[name], t.squared_error, t.max_error, t.energy)
        for name, t in tallies.items()
        if t.rounded
    ]
    shifted, rounded = sum(t.shifted for t in tallies.values()), sum(t.rounded for t in tallies.values())
    verbatim = sum(elements.values()) // NV_BLOCK - shifted - rounded
    return Report.of(
        plan.source,
        plan.target,
        plan.selection,
        destination,
        half_blocks={"verbatim": verbatim, "shifted": shifted, "rounded": rounded},
        inexact=inexact,
        marlin_exact=all(domain.marlin_exact for domain in plan.domains),
        bytes={"read": plan.read_by(written), "written": sum(shards[name].checksum.bytes for name in written)},
        fp8=[
            Fp8Tensor(module, signal_to_noise(tally.energy, tally.squared_error))
            for module in plan.selection.fp8
            if (tally := tallies.get(module)) is not None
        ],
        notes=[*plan.notes, *([kept] if len(written) < len(shards) else [])],
    )
