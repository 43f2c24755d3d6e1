"""What may become DST, and what of an existing DST may be replaced: nothing that fp4cast has not written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from fp4cast.checkpoints.card_files import is_card_file
from fp4cast.checkpoints.checksums import checksum_of_path
from fp4cast.checkpoints.directory import (
    CONFIG,
    QUANT_CONFIG,
    RECEIPT,
    Checkpoint,
    companion_sizes,
)
from fp4cast.checkpoints.index import INDEX, MAX_FILE_NAME
from fp4cast.errors import CheckpointError, DestinationError
from fp4cast.verification.receipt import Receipt

_SHOWN = 5  # files that an error names


def real_path(path: str | Path) -> Path:
    """A path without links; its last component need not exist.

    Raises:
        DestinationError: links in a circle, or a name that no file system takes.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DestinationError(f"{str(path)[:200]}: is not a usable path: {error}") from error


def check_place(source: Path, destination: Path) -> None:
    """Refuse a destination that overlaps the source, or that no option allows to replace.

    It runs before any work, so that nobody waits for a refusal, and again as a part of `check_destination`.

    Raises:
        DestinationError: the message says what is there and what to do.
    """
    _refuse(destination, lambda: _objection(source.resolve(), destination))


def check_destination(source: Path, destination: Path, *, overwrite: bool) -> None:
    """Like `check_place`; refuse what must not be replaced, too.

    Raises:
        DestinationError: the message says what is there and what to do.
    """
    check_place(source, destination)
    _refuse(destination, lambda: _replacement(destination, overwrite))


def _refuse(destination: Path, objections: Callable[[], str]) -> None:
    try:
        objection = objections()
    except (OSError, RuntimeError) as error:
        objection = f"cannot be examined: {getattr(error, 'strerror', None) or error}"
    if objection:
        raise DestinationError(f"{destination}: {objection}")


def _objection(source: Path, destination: Path) -> str:
    if _overlap(source, destination):
        return f"must lie apart from the source {source}"
    if (length := len(os.fsencode(destination.name))) > MAX_FILE_NAME:
        return f"its name has {length} bytes, expected at most {MAX_FILE_NAME}: longer ones are needed meanwhile"
    if not destination.exists():
        return ""
    if not destination.is_dir():
        return "exists and is not a directory"
    if destination.is_mount() or str(destination) in mount_points():
        return "is a mount point, which cannot be replaced; name a directory inside it"
    here = Path.cwd()
    if destination == here or destination in here.parents:
        return f"holds the working directory {here}, so it cannot be replaced; name a directory inside it"
    if (home := _home()) is not None and (destination == home or destination in home.parents):
        return "holds the home directory, so it cannot be replaced; name a directory inside it"
    if not any(destination.iterdir()):
        return ""
    return "" if (destination / RECEIPT).exists() else _foreign(destination, Receipt.read(destination))


def mount_points(table: Path = Path("/proc/self/mountinfo")) -> set[str]:
    """Where file systems are mounted, as Linux lists them: also a directory of the same one, as containers have it."""
    try:
        fields = [line.split(" ") for line in table.read_text(errors="surrogateescape").splitlines()]
    except OSError:
        return set()
    return {re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), each[4]) for each in fields if len(each) > 4}


def _home() -> Path | None:
    """The user's home directory; None where the system knows none, as in many containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _foreign(destination: Path, receipt: Receipt) -> str:
    if receipt.problem:
        return f"its receipt cannot be read, so nothing tells whether fp4cast wrote what is there: {receipt.problem}"
    if shown := _some(foreign_files(destination, receipt)):
        return f"holds files that fp4cast did not write: {shown}; move them away, or name another directory"
    return ""


def _replacement(destination: Path, overwrite: bool) -> str:
    if not destination.exists() or not any(destination.iterdir()):
        return ""
    receipt = Receipt.read(destination)
    if objection := _foreign(destination, receipt):
        return objection
    if shown := _some(edited_files(destination, receipt)):
        return f"holds files that were changed since fp4cast wrote them: {shown}; move them away first"
    return "" if overwrite else "exists and holds a checkpoint by fp4cast; pass --overwrite to replace it"


def _some(files: Iterator[str]) -> str:
    first = list(islice(files, _SHOWN + 1))
    return ", ".join(first[:_SHOWN]) + (", ..." if len(first) > _SHOWN else "")


def _overlap(source: Path, destination: Path) -> bool:
    """Whether one holds the other, or is it; inodes tell it even where a directory is mounted twice."""
    if source == destination or source in destination.parents or destination in source.parents:
        return True
    there = [path for path in (destination, *destination.parents) if path.exists()]
    return any(path.samefile(source) for path in there) or (
        destination.exists() and any(path.samefile(destination) for path in source.parents)
    )


def edited_files(destination: Path, receipt: Receipt) -> Iterator[str]:
    """The files of a destination that are no longer what its receipt lists: people edit cards and configs.

    Shards are compared by their sizes alone: reading them would take as long as writing them.
    """
    if not receipt.intact:
        yield RECEIPT
    for name, noted in sorted(receipt.files.items()):
        path = destination / name
        if path.is_file() and not path.is_symlink():
            same = path.stat().st_size == noted.bytes
            if not same or (path.suffix != ".safetensors" and checksum_of_path(path) != noted):
                yield name


def companions_to_carry(checkpoint: Checkpoint) -> dict[PurePosixPath, int]:
    """The source's companions, all of which have a place in DST, and their sizes in bytes.

    Raises:
        CheckpointError: a folder is called like a file that DST will hold.
    """
    companions = companion_sizes(checkpoint)
    for folder in (companion.parts[0] for companion in companions if len(companion.parts) > 1):
        taken = folder in (CONFIG, INDEX, QUANT_CONFIG, RECEIPT) or is_card_file(folder)
        if taken or folder.endswith(".safetensors"):
            raise CheckpointError(
                f"{checkpoint.path / folder}: is a folder; expected a file of that name, or none. Rename the folder."
            )
    return companions


def foreign_files(destination: Path, receipt: Receipt) -> Iterator[str]:
    """What a directory holds beside the files that its receipt lists; everything, if there is no receipt.

    Links, devices and empty folders are listed too: fp4cast writes none.
    """
    listed = set(receipt.files)
    if listed:
        listed.add(RECEIPT)

    def refuse(error: OSError) -> None:
        raise error  # what cannot be seen is not ours

    for folder, folders, files in os.walk(destination, onerror=refuse):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        if not folders and not files and here != destination:
            yield f"{here.relative_to(destination)}/"
        for name in sorted([*files, *links]):
            path = here / name
            relative = path.relative_to(destination).as_posix()
            if relative not in listed or path.is_symlink() or not path.is_file():
                yield relative
