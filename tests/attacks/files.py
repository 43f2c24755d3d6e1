"""The files of an input on a disk, and what changed there."""

import os
import shutil
from pathlib import Path

from attacks.starts import Special


def remove(path: Path) -> None:
    """Remove whatever is there."""
    try:
        path.unlink()
    except IsADirectoryError:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass


def put(path: Path, data: bytes | Special, root: Path) -> None:
    """Write a file, or what is in the place of one."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif data.kind == "fifo":
        os.mkfifo(path)
    elif data.kind == "directory":
        path.mkdir()
        (path / "x").write_bytes(b"x")
    elif data.kind == "link":
        path.symlink_to(data.argument.replace("{outside}", str(root / "outside")))
    else:
        with path.open("wb") as file:
            file.truncate(int(data.argument))


def holds(path: Path, data: bytes | Special) -> bool:
    """Whether a file has these bytes; true of what is no file."""
    return not isinstance(data, bytes) or path.read_bytes() == data


def snapshot(root: Path, home: Path) -> dict[str, object]:
    """Kind, size and time of everything in the scratch directory that a command could change."""
    found: dict[str, object] = {}
    todo = [str(root / "cwd"), str(home)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                stat = entry.stat(follow_symlinks=False)
                directory = entry.is_dir(follow_symlinks=False)
                found[entry.path] = (stat.st_mode, stat.st_ino, 0 if directory else stat.st_size, stat.st_mtime_ns)
                if directory:
                    todo.append(entry.path)
    home_entry = found.pop(str(home / "out"), None)
    assert home_entry is None
    return found
