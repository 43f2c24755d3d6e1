"""Say what came back: values always, and whether every byte is the original's, as far as a receipt proves it.

NVFP4 weights alone do not say it: a cast may have shifted codes, and a block of zeros outside of the window has another
exponent. The receipt of a conversion holds these exponents, and digests of the original's headers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fp4cast.checkpoints.directory import CONFIG
from fp4cast.checkpoints.raw_header import digest_of_header
from fp4cast.conversion.direction import WayBack
from fp4cast.conversion.plan import Plan
from fp4cast.parallel.engines import Engine
from fp4cast.parallel.progress import AdvanceOf
from fp4cast.verification.files import ListedFile, check_file
from fp4cast.verification.notes import named
from fp4cast.verification.original import Original
from fp4cast.verification.receipt import Receipt
from fp4cast.verification.report import Report


def announce(back: WayBack, report: Report) -> Report:
    """The report of the way back, with what was left out."""
    notes = list(report.notes)
    if back.dropped:
        notes.append(f"{len(back.dropped)} tensors have no place in MXFP4 and were dropped: {named(back.dropped)}")
    return replace(report.as_way_back(report.source, report.destination), notes=notes)


def prove(plan: Plan, back: WayBack, report: Report, engine: Engine, progress: AdvanceOf) -> Report:
    """The report with a sentence on the original's bytes; reads every shard of the source once more.

    Args:
        plan: the plan that was executed.
        back: its direction.
        report: of the verification, which has found every value right.
        engine: runs the checksums.
        progress: called with (bytes just read, total bytes).
    """
    doubts = list(_doubts(plan, back)) if back.original != Original() else []
    if back.original != Original() and not doubts:
        doubts += _changes(plan, engine, progress)
    if back.original == Original():
        sentence = (
            "byte for byte the original: unknown, as no receipt says which bytes it had. Every value is equal; "
            "codes that the cast has shifted, and scales of blocks of zeros, may be others"
        )
        return replace(report, notes=(*report.notes, sentence))
    answer = f"no: {'; '.join(doubts)}. Every value is equal" if doubts else "yes, every shard and config.json"
    return replace(report, notes=(*report.notes, f"byte for byte the original: {answer}"), original=not doubts)


def _doubts(plan: Plan, back: WayBack) -> Iterator[str]:
    """Why some bytes may be others, by the plan alone."""
    if lost := sorted(back.lost & plan.source.pairs.keys()):
        yield f"exponents of blocks outside of the window are not known, in {len(lost)} tensors: {named(lost)}"
    written = {shard.file: digest_of_header(shard.layout.header) for shard in plan.shards}
    if plan.documents[CONFIG] != back.original.config.encode(errors="replace"):
        yield f"{CONFIG} was edited since"
    if other := sorted(name for name in written if back.original.headers.get(name) != written[name]):
        yield f"{len(other)} of {len(written)} shards have another header: {named(other)}"


def _changes(plan: Plan, engine: Engine, progress: AdvanceOf) -> Iterator[str]:
    """Whether the source's shards are those that the conversion wrote."""
    path = plan.source.checkpoint.path
    listed = {name: noted for name, noted in Receipt.read(path).files.items() if name in plan.source.checkpoint.shards}
    total = sum(noted.bytes for noted in listed.values())
    todo = [ListedFile(path, name, noted) for name, noted in sorted(listed.items())]
    checked = engine.map(check_file, todo, lambda n: progress(n, total), nbytes=lambda listed: listed.noted.bytes)
    changed = [each.name for each in checked if each is not None]
    changed += sorted(plan.source.checkpoint.shards.keys() - listed.keys())
    if changed:
        yield f"{len(changed)} shards of the source are not as they were written: {named(changed)}"
