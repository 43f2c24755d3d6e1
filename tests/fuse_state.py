"""What the FUSE server keeps: how it is to behave, and the paths of the files that the kernel knows by number."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Settings:
    """What the file system is like.

    Attributes:
        latency: seconds before a read is answered.
        heads: how many reads wait at the same time; 0 for any number, 1 for a disk.
        errors: errno's names by the names of requests; of SETATTR, by "SETATTR mode" and "SETATTR times", too.
        after: how many of these requests succeed first; all later ones fail.
        only: what the file's name must hold, for an error.
        short: "READ" and "WRITE", if those of more than a page get half of it.
        ends: after how many reads of a weight file the next ones find its end; -1 for none.
        direct: no page cache, so that a short read is seen by who reads.
        keep: keep a file's pages when it is opened again, as NFS does for a file that has not changed.
        locks: ask the server for locks (and fail if `errors` say so), instead of keeping them in this kernel.
        size: 0 to say that the disk has 0 of 0 bytes.
    """

    latency: float = 0.0
    heads: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    after: int = 0
    only: str = ""
    short: tuple[str, ...] = ()
    ends: int = -1
    direct: bool = False
    keep: bool = False
    locks: bool = False
    size: int = 1


class Nodes:
    """The paths of the files that the kernel knows by number; 1 is the root."""

    def __init__(self, root: Path) -> None:
        self._paths, self._numbers, self._last = {1: root}, {root: 1}, 1
        self._lock = threading.Lock()

    def path(self, number: int) -> Path:
        with self._lock:
            return self._paths[number]

    def number(self, path: Path) -> int:
        with self._lock:
            if path not in self._numbers:
                self._last += 1
                self._numbers[path], self._paths[self._last] = self._last, path
            return self._numbers[path]

    def drop(self, path: Path) -> None:
        """What comes to this path later is another file."""
        with self._lock:
            self._numbers.pop(path, None)

    def move(self, old: Path, new: Path) -> None:
        with self._lock:
            self._numbers.pop(new, None)
            for path in [path for path in self._numbers if path == old or old in path.parents]:
                number = self._numbers.pop(path)
                self._paths[number] = new / path.relative_to(old)
                self._numbers[self._paths[number]] = number
