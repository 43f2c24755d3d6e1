"""Write the model card of a destination anew: of an older version's, or where more is known of the source by now."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path, PurePosixPath

from fp4cast.cards.metadata import read_metadata
from fp4cast.cards.subject import Subject, source_date
from fp4cast.cards.text import card_files
from fp4cast.checkpoints.byte_ranges import sync_path, write_whole
from fp4cast.checkpoints.card_files import CARD, beside_card, is_card_file
from fp4cast.checkpoints.checksums import Checksum, checksum_of_bytes, checksum_of_path
from fp4cast.checkpoints.directory import CONFIG, RECEIPT, companion_sizes
from fp4cast.checkpoints.origin import UNKNOWN, Origin, origin_of
from fp4cast.conversion.companions import copy_companion
from fp4cast.conversion.destination import real_path
from fp4cast.conversion.domains import find_domains
from fp4cast.conversion.execute import writing
from fp4cast.conversion.preview import Preview
from fp4cast.errors import DestinationError, UsageError, VerificationError
from fp4cast.hub.resolve import resolve
from fp4cast.parallel.engines import make_engine
from fp4cast.parallel.progress import Progress, ignore
from fp4cast.verification.opened import Opened, open_both
from fp4cast.verification.receipt import Receipt
from fp4cast.verification.report import Report
from fp4cast.verification.verify import verify_opened


def write_card(
    src: str | Path,
    dst: str | Path,
    *,
    source_id: str | None = None,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress = ignore,
) -> Report:
    """Compare every value of a conversion with its source, and write its card, its picture and its receipt anew.

    Args:
        src: the MXFP4 checkpoint: a directory or a model id.
        dst: the directory that `convert` has made of it.
        source_id: as for `convert`; without it, what `src` or the receipt says.
        overwrite: replace a card that somebody has edited.
        jobs: threads; None for one a core.
        progress: called, from worker threads, with (phase, bytes just done, total bytes or 0).

    Returns:
        The report of the comparison, with the card's path.

    Raises:
        VerificationError: `dst` is not what `src` becomes; nothing is written.
        DestinationError: `dst` has no receipt, or an edited card.
        UsageError: `dst` is an export of `ptq`, which no card of a conversion describes; a date that is none.
    """
    begin, destination = time.monotonic(), real_path(dst)
    receipt, opened, subject = _compare(resolve(src), destination, source_id, overwrite, jobs, progress)
    files = _copied(opened)
    _write(destination, subject, receipt, files)
    return replace(subject.report, destination=str(dst), card=str(Path(dst) / CARD), seconds=time.monotonic() - begin)


def preview_card(
    src: str | Path,
    dst: str | Path,
    *,
    source_id: str | None = None,
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress = ignore,
) -> Preview:
    """What `write_card`, which has the same arguments, would write: every value is compared, nothing is written."""
    source = resolve(src, download=False)
    _, opened, subject = _compare(source, real_path(dst), source_id, overwrite, jobs, progress)
    copied = {str(beside_card(name)): size for name, size in _cards_of(opened).items()}
    sizes = {name: len(data) for name, data in card_files(subject).items()}
    return Preview(str(dst), {**copied, **sizes, RECEIPT: None}, {"source": str(source), "exact": subject.report.exact})


def _compare(
    source: Path, destination: Path, source_id: str | None, overwrite: bool, jobs: int | None, progress: Progress
) -> tuple[Receipt, Opened, Subject]:
    """(the receipt, both sides, what the card is about), every value compared."""
    begin, day, receipt = time.monotonic(), source_date(), Receipt.read(destination)
    _check(destination, receipt, overwrite)
    engine = make_engine("local", jobs)
    opened = open_both(source, destination, CONFIG)
    found = verify_opened(
        opened, engine=engine, strict=False, progress=lambda n, of: progress("verify", n, of), begin=begin
    )
    if not found.ok:
        raise VerificationError(
            f"{destination}: differs from {source} in {len(found.differences)} places, the first is "
            f"{found.differences[0]}; no card was written"
        )
    origin = origin_of(source, source_id)
    domains = find_domains(
        opened.selection.cast, inexact="report", jobs=jobs, progress=lambda n, of: progress("scan", n, of)
    )
    subject = Subject(
        source=opened.source,
        target=opened.target,
        selection=opened.selection,
        domains=domains,
        report=found,
        origin=origin if origin.id else _origin(receipt),
        day=day,
        size=sum(shard.size for shard in opened.destination.shards.values()),
        files={str(beside_card(name)) for name in companion_sizes(opened.source.checkpoint)},
        card=read_metadata(source / CARD),
        version=receipt.version,
    )
    return receipt, opened, subject


def _check(destination: Path, receipt: Receipt, overwrite: bool) -> None:
    """Refuse a destination that no card can be written for."""
    if not receipt.files or not receipt.intact:
        raise DestinationError(
            f"{destination / RECEIPT}: {receipt.problem or 'is missing, or is not what was written'}; expected the "
            "receipt of a conversion by fp4cast, which lists its files"
        )
    if receipt.quantized or "tensors" not in receipt.facts:
        raise UsageError(f"{destination}: is an export of `fp4cast ptq`, not a conversion; write its card by hand")
    for path in sorted(destination.iterdir()):
        edited = is_card_file(path.name) and (
            path.is_symlink() or not path.is_file() or checksum_of_path(path) != receipt.files.get(path.name)
        )
        if edited and not overwrite:
            raise DestinationError(
                f"{path}: was changed since fp4cast wrote it, or is somebody's own; pass --overwrite to replace it"
            )


def _origin(receipt: Receipt) -> Origin:
    """The origin that a receipt says."""
    said = receipt.facts.get("source")
    if not isinstance(said, dict) or not said.get("id"):
        return UNKNOWN
    try:
        return origin_of(Path(), "@".join(str(said[key]) for key in ("id", "revision") if said.get(key)))
    except UsageError:
        return UNKNOWN


def _copied(opened: Opened) -> dict[str, Checksum]:
    """Copy the source's cards beside the new one, in the place of older ones; returns the checksum of each."""
    source, found = opened.source.checkpoint, dict[str, Checksum]()
    for old in filter(is_card_file, opened.receipt.files):
        (opened.destination.path / old).unlink(missing_ok=True)
    for name, size in _cards_of(opened).items():
        target = opened.destination.path / beside_card(name)
        target.unlink(missing_ok=True)
        found[target.name] = copy_companion(source.path, name, size, target)
    return found


def _cards_of(opened: Opened) -> dict[PurePosixPath, int]:
    """The source's cards and their sizes."""
    return {name: size for name, size in companion_sizes(opened.source.checkpoint).items() if is_card_file(str(name))}


def _write(destination: Path, subject: Subject, receipt: Receipt, copied: dict[str, Checksum]) -> None:
    """Write card and picture, then the receipt that knows them."""
    mode = (destination / CONFIG).stat().st_mode & 0o666 | 0o600
    rest = {name: noted for name, noted in receipt.files.items() if not is_card_file(name)}
    files = card_files(subject)
    with writing(destination / CARD):
        for name, data in files.items():
            write_whole(destination / name, data, mode)
        written = {name: checksum_of_bytes(data) for name, data in files.items()}
        source = {"source": subject.origin.to_json()} if subject.origin.id else {}
        facts = {**source, **{key: value for key, value in receipt.facts.items() if key != "source"}}
        new = replace(receipt, facts=facts, files={**rest, **copied, **written})
        write_whole(destination / RECEIPT, new.to_bytes(), mode)
        for name in (*new.files, RECEIPT):
            if is_card_file(name) or name == RECEIPT:
                sync_path(destination / name)
        sync_path(destination)
