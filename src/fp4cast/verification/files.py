"""Check a destination's files against its receipt, without the source: is a copy what the conversion wrote?"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.card_files import is_card_file
from fp4cast.checkpoints.checksums import Checksum, checksum
from fp4cast.checkpoints.directory import CONFIG, QUANT_CONFIG, RECEIPT, resolve_link
from fp4cast.checkpoints.gguf_file import is_gguf
from fp4cast.checkpoints.index import INDEX
from fp4cast.errors import CheckpointError, UsageError
from fp4cast.hub.resolve import resolve
from fp4cast.parallel.engines import make_engine
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.parallel.workers import Workers
from fp4cast.verification.receipt import Receipt
from fp4cast.verification.report import Difference, differences_json, passes, verdicts
from fp4cast.verification.structure import RECEIPT_CHANGED, unlisted

_DOCUMENTS = {CONFIG, INDEX, QUANT_CONFIG}


@dataclass(frozen=True)
class FilesReport:
    """What `verify_files` found.

    Attributes:
        destination: the directory.
        files: how many files were checked.
        bytes: their size.
        facts: what the receipt says of the conversion.
        seconds: wall time.
        differences: the files that are not as they were written.
        strict: a companion that differs counts as wrong, too.
    """

    destination: str
    files: int
    bytes: int
    facts: dict[str, Any]
    seconds: float
    differences: tuple[Difference, ...]
    strict: bool = False

    @property
    def ok(self) -> bool:
        """Whether every file that an engine reads is as it was written."""
        return passes(self.differences, strict=self.strict)

    @property
    def damage(self) -> list[Difference]:
        """What an engine reads and is not as it was written."""
        return [difference for difference in self.differences if difference.area != "companions"]

    def to_json(self) -> dict[str, Any]:
        """The JSON document that the command line prints."""
        return {
            "destination": self.destination,
            "files": self.files,
            "bytes": self.bytes,
            "receipt": self.facts,
            "seconds": round(self.seconds, 3),
            "ok": self.ok,
            "verdicts": verdicts(self.differences),
            "differences": differences_json(self.differences),
        }


def verify_files(
    dst: str | Path,
    *,
    jobs: int | None = None,
    engine: str = "local",
    strict: bool = False,
    progress: AdvanceOf = ignore,
) -> FilesReport:
    """Check the sizes and checksums of a destination's files against its receipt; the source is not needed.

    It shows that a copy is what was written. That this has the source's values, `convert` and `verify` have shown.

    Args:
        dst: the NVFP4 checkpoint: a directory or a model id.
        jobs: threads; None for one a core. 1 works in the caller's own thread.
        engine: "local" for this machine, or "ray" for the tasks of a Ray cluster, with `jobs` threads each.
        strict: a companion file that differs counts as wrong, too; a model card never does.
        progress: called, from worker threads, with (bytes just read, total bytes).

    Raises:
        CheckpointError: there is no receipt, or it lists nothing.
        UsageError: it is a GGUF file.
    """
    if is_gguf(dst):
        raise UsageError(f"{dst}: a GGUF file has no receipt; name its source, too: fp4cast verify SRC {dst}")
    begin, worker, path = time.monotonic(), make_engine(engine, jobs), resolve(dst)
    receipt = Receipt.read(path)
    if not receipt.files:
        why = receipt.problem or f"{path / RECEIPT}: {'lists no files' if receipt.found else 'is missing'}"
        raise CheckpointError(
            f"{why}; expected the receipt of a conversion by fp4cast. With the source at hand: fp4cast verify SRC DST"
        )
    listed = {name: noted for name, noted in receipt.files.items() if not is_card_file(name)}
    total = sum(noted.bytes for noted in listed.values())
    todo = [ListedFile(path, name, noted) for name, noted in sorted(listed.items())]
    checked = worker.map(check_file, todo, lambda n: progress(n, total), nbytes=lambda listed: listed.noted.bytes)
    found = [each for each in checked if each is not None]
    if not receipt.intact:
        found.append(Difference(RECEIPT, "config", RECEIPT_CHANGED))
    found += unlisted(path, {*receipt.files, RECEIPT}, "is not among the files that the conversion wrote")
    return FilesReport(
        str(path), len(listed), total, dict(receipt.facts), time.monotonic() - begin, tuple(found), strict
    )


@dataclass(frozen=True)
class ListedFile:
    """A file that the receipt lists."""

    directory: Path
    name: str
    noted: Checksum


def check_file(listed: ListedFile, pool: Workers) -> Difference | None:
    """Compare one file's size and checksum with what was noted."""
    name, noted, path = listed.name, listed.noted, listed.directory / listed.name
    kind = "bytes" if name.endswith(".safetensors") else "config" if name in _DOCUMENTS else "file"
    try:
        if not path.is_file():
            return Difference(name, kind, "is missing")
        with File(resolve_link(listed.directory, path), wait=False) as file:
            size = os.fstat(file.fd).st_size
            if size != noted.bytes:
                return Difference(name, kind, f"expected {noted.bytes} bytes, got {size}")
            actual = checksum(file, pool.map, pool.advance)
    except (OSError, CheckpointError) as error:
        return Difference(name, kind, str(error)[:500])
    if actual != noted:
        return Difference(name, kind, f"expected the checksum {noted.xxh3}, got {actual.xxh3}")
    return None
