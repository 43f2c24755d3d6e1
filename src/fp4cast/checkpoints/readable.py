"""What reading ranges of bytes means, whether a file lies here or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from fp4cast.formats import Bytes

_GAP = 64 << 10  # bytes between two ranges that may as well be read
_ADVISED = 8 << 20  # bytes after which another range begins


class Readable:
    """Something whose ranges of bytes can be read: a file here, or one that lies elsewhere.

    Attributes:
        gap: records that are read with their neighbours rather than apart, up to so many between them.
    """

    gap = 256

    def read(self, start: int, nbytes: int) -> Bytes:
        """Read bytes [start, start + nbytes) as uint8 [nbytes]."""
        raise NotImplementedError

    def gather(self, start: int, blocks: np.ndarray[Any, np.dtype[np.int64]], size: int, gap: int = 0) -> Bytes:
        """Read records of `size` bytes at ascending positions, near ones in one read: uint8 [len(blocks), size]."""
        out = np.empty((len(blocks), size), np.uint8)
        cuts = np.flatnonzero(np.diff(blocks) > (gap or self.gap)) + 1
        bounds = [0, *cuts.tolist(), len(blocks)]
        for a, b in pairwise(bounds):
            if a < b:
                first, last = int(blocks[a]), int(blocks[b - 1])
                records = self.read(start + first * size, (last - first + 1) * size).reshape(-1, size)
                out[a:b] = records[blocks[a:b] - first]
        return out


class ReadableFiles(Protocol):
    """Files by their paths, of which ranges are read; used in a `with` block."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """Let go of all files."""

    def __getitem__(self, path: Path) -> Readable:
        """A file."""

    def prefetch(self, ranges: Iterable[tuple[Path, int, int]]) -> None:
        """Announce ranges (file, first byte, bytes) that this thread will read next."""


def merged(ranges: Iterable[tuple[Path, int, int]]) -> Iterator[tuple[Path, int, int]]:
    """Ranges (file, first byte, bytes) with those in one that nearly follow each other: for advice to the kernel."""
    path, start, end = None, 0, 0
    for other, first, nbytes in ranges:
        if path is not None and (other is not path or not end <= first <= end + _GAP or end - start >= _ADVISED):
            yield path, start, end - start
            path = None
        if path is None:
            path, start = other, first
        end = first + nbytes
    if path is not None:
        yield path, start, end - start
