"""Publish a destination on the Hub: the files that its conversion has written, if they still are what it wrote."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.directory import RECEIPT
from fp4cast.errors import DestinationError
from fp4cast.hub.upload import Place, upload
from fp4cast.parallel.progress import AdvanceOf, ignore
from fp4cast.verification.files import verify_files
from fp4cast.verification.receipt import Receipt


@dataclass(frozen=True)
class Pushed:
    """What `push` did.

    Attributes:
        destination: the directory.
        repository: ORG/NAME.
        page: its address.
        commit: the commit that holds the files.
        public: everybody can see it.
        files: how many there are.
        bytes: their size.
        seconds: wall time.
    """

    destination: str
    repository: str
    page: str
    commit: str
    public: bool
    files: int
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The JSON document that the command line prints."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


def files_to_push(directory: Path) -> dict[str, int]:
    """The files of a destination by path, and their sizes: the conversion's own, not what lies beside them.

    Raises:
        DestinationError: fp4cast did not write this directory, or a file is missing.
    """
    receipt = Receipt.read(directory)
    if not receipt.files:
        why = receipt.problem or f"{directory / RECEIPT}: is missing, or lists no files"
        raise DestinationError(f"{why}; expected a checkpoint by fp4cast")
    names = sorted({*receipt.files, RECEIPT})
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise DestinationError(f"{directory / missing[0]}: is missing; its receipt lists it")
    return {name: (directory / name).stat().st_size for name in names}


def push(
    directory: Path, place: Place, *, check: bool = True, jobs: int | None = None, progress: AdvanceOf = ignore
) -> Pushed:
    """Upload a destination to a repository on the Hub.

    Args:
        directory: DST.
        place: the repository, as `find_place` has found it.
        check: compare the files with the receipt first; needless right after a conversion.
        jobs: threads; None for one a core.
        progress: called with (bytes just checked, total bytes).

    Raises:
        DestinationError: a file is not what the conversion wrote, or the Hub refuses; what is uploaded already is not
            sent again by the next attempt.
    """
    begin, files = time.monotonic(), files_to_push(directory)
    if check:
        found = verify_files(directory, jobs=jobs, progress=progress)
        if wrong := found.damage:
            raise DestinationError(
                f"{directory}: files that are not as they were written: {len(wrong)}, the first is {wrong[0]}; nothing "
                "was uploaded"
            )
    page, commit = upload(directory, list(files), place)
    return Pushed(
        str(directory),
        place.name,
        page,
        commit,
        place.public,
        len(files),
        sum(files.values()),
        time.monotonic() - begin,
    )
