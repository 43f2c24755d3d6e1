"""Byte ranges of files: reads that are never short, copies inside the kernel, writes at an offset."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fp4cast.errors import CheckpointError
from fp4cast.formats import Bytes

__all__ = ["CHUNK_BYTES", "File", "Files", "copy_range", "scratch", "write_all"]

CHUNK_BYTES = 8 << 20  # what one step of reading or copying holds in memory
COPY_BYTES = 64 << 20  # what the kernel copies between two reports of progress


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Bytes] = {}


_SCRATCH = _Scratch()


def scratch(slot: str, *shape: int) -> Bytes:
    """A buffer of this thread, uint8 [*shape], that holds until the slot is asked for again.

    Fresh memory costs a page fault for every 4 kB, which takes longer than reading them from the page cache.
    """
    size = math.prod(shape)
    buffer = _SCRATCH.buffers.get(slot)
    if buffer is None or buffer.nbytes < size:
        buffer = _SCRATCH.buffers[slot] = np.empty(size, np.uint8)
    return buffer[:size].reshape(shape)


class File:
    """A file opened for reading ranges of it; a short read is an error, never a silent zero."""

    def __init__(self, path: Path) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        self.path = path

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)

    def read(self, start: int, nbytes: int, slot: str = "") -> Bytes:
        """Bytes [start, start + nbytes) as uint8 [nbytes]; with a slot, in that `scratch` buffer."""
        out = scratch(slot, nbytes) if slot else np.empty(nbytes, np.uint8)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: Bytes) -> None:
        """Fill a contiguous array from `start` on."""
        view, done = out.data.cast("B"), 0
        while done < len(view):
            try:
                got = os.preadv(self.fd, [view[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
            if got <= 0:
                raise CheckpointError(
                    f"{self.path}: ended at byte {start + done}, expected {len(view) - done} more. "
                    "It was truncated while it was read."
                )
            done += got

    def prefetch(self, start: int, nbytes: int) -> None:
        """Ask the kernel to begin reading bytes that will be wanted soon."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is advice
                os.posix_fadvise(self.fd, start, nbytes, os.POSIX_FADV_WILLNEED)

    def gather(self, start: int, blocks: np.ndarray[Any, np.dtype[np.int64]], size: int, gap: int = 256) -> Bytes:
        """Records of `size` bytes at ascending positions, near ones with one read: uint8 [len(blocks), size]."""
        out = np.empty((len(blocks), size), np.uint8)
        cuts = np.flatnonzero(np.diff(blocks) > gap) + 1
        bounds = [0, *cuts.tolist(), len(blocks)]
        for a, b in pairwise(bounds):
            if a < b:
                first, last = int(blocks[a]), int(blocks[b - 1])
                records = self.read(start + first * size, (last - first + 1) * size).reshape(-1, size)
                out[a:b] = records[blocks[a:b] - first]
        return out


class Files:
    """Files opened for reading once each, shared by threads, closed together."""

    def __init__(self) -> None:
        self._files: dict[Path, File] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def __getitem__(self, path: Path) -> File:
        with self._lock:
            if path not in self._files:
                self._files[path] = File(path)
            return self._files[path]


def copy_range(
    source: File,
    start: int,
    target: int,
    offset: int,
    nbytes: int,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Copy bytes between files inside the kernel where it can, through one small buffer elsewhere.

    Args:
        source: the file to read.
        start: first byte there.
        target: descriptor of the file to write.
        offset: where they go.
        nbytes: how many.
        progress: called with the number of bytes just copied; may raise to stop.
    """
    done, in_kernel = 0, True
    while done < nbytes:
        if in_kernel:
            got = _kernel_copy(source, start + done, target, offset + done, min(COPY_BYTES, nbytes - done))
            in_kernel = got > 0
        else:
            chunk = source.read(start + done, min(CHUNK_BYTES, nbytes - done), "copy")
            write_all(target, offset + done, chunk)
            got = len(chunk)
        done += got
        progress(got)


def _kernel_copy(source: File, start: int, target: int, offset: int, nbytes: int) -> int:
    """Bytes copied; 0 where this kernel cannot copy between these files, or where the source ends."""
    if not hasattr(os, "copy_file_range"):
        return 0  # Linux has it
    try:
        return os.copy_file_range(source.fd, target, nbytes, start, offset)
    except OSError:
        return 0  # the plain way follows, and meets any real error again


def write_all(target: int, offset: int, data: Bytes) -> None:
    """Write all of `data` at `offset`."""
    view, done = data.data.cast("B"), 0
    while done < len(view):
        done += os.pwrite(target, view[done:], offset + done)
