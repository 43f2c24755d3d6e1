"""What may become DST, and what of an existing DST may be replaced: nothing that fp4cast has not written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from fp4cast.checkpoints.checksums import checksum_of_path
from fp4cast.checkpoints.directory import CONFIG, INDEX, QUANT_CONFIG, RECEIPT, Checkpoint, companion_sizes
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
    if not destination.exists():
        return ""
    if not destination.is_dir():
        return "exists and is not a directory"
    if destination.is_mount():
        return "is a mount point, which cannot be replaced; name a directory inside it"
    here = Path.cwd()
    if destination == here or destination in here.parents:
        return f"holds the working directory {here}, so it cannot be replaced; name a directory inside it"
    if destination == Path.home() or destination in Path.home().parents:
        return "holds the home directory, so it cannot be replaced; name a directory inside it"
    if not any(destination.iterdir()):
        return ""
    return "" if (destination / RECEIPT).exists() else _foreign(destination)


def _foreign(destination: Path) -> str:
    if shown := _some(foreign_files(destination)):
        return f"holds files that fp4cast did not write: {shown}; move them away, or name another directory"
    return ""


def _replacement(destination: Path, overwrite: bool) -> str:
    if not destination.exists() or not any(destination.iterdir()):
        return ""
    if objection := _foreign(destination):
        return objection
    if not overwrite:
        return "exists and holds another checkpoint by fp4cast; pass --overwrite to replace it"
    if shown := _some(edited_files(destination)):
        return f"holds files that were changed since fp4cast wrote them: {shown}; move them away first"
    return ""


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


def edited_files(destination: Path) -> Iterator[str]:
    """The small files of a destination that are no longer what its receipt lists: people edit cards and configs."""
    for name, noted in sorted(Receipt.read(destination).files.items()):
        path = destination / name
        if path.suffix != ".safetensors" and path.is_file() and checksum_of_path(path) != noted:
            yield name


def companions_to_carry(checkpoint: Checkpoint) -> dict[PurePosixPath, int]:
    """The source's companions, all of which have a place in DST, and their sizes in bytes.

    Raises:
        CheckpointError: a folder is called like a file that DST will hold.
    """
    companions = companion_sizes(checkpoint)
    for folder in (companion.parts[0] for companion in companions if len(companion.parts) > 1):
        if folder in (CONFIG, INDEX, QUANT_CONFIG, RECEIPT) or folder.endswith(".safetensors"):
            raise CheckpointError(
                f"{checkpoint.path / folder}: is a folder; expected a file of that name, or none. Rename the folder."
            )
    return companions


def foreign_files(destination: Path) -> Iterator[str]:
    """What a directory holds beside the files that its receipt lists; everything, if there is no receipt.

    Links, devices and empty folders are listed too: fp4cast writes none.
    """
    try:
        listed = set(Receipt.read(destination).files)
    except CheckpointError:
        listed = set()
    if listed:
        listed.add(RECEIPT)
    for folder, folders, files in os.walk(destination):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        if not folders and not files and here != destination:
            yield f"{here.relative_to(destination)}/"
        for name in sorted([*files, *links]):
            path = here / name
            relative = path.relative_to(destination).as_posix()
            if relative not in listed or path.is_symlink() or not path.is_file():
                yield relative
