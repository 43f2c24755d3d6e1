"""Byte ranges of files: reads that are never short, copies inside the kernel, writes at an offset."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fp4cast.checkpoints.file_system import is_remote
from fp4cast.checkpoints.readable import Readable, merged
from fp4cast.errors import CheckpointError, PlatformError
from fp4cast.formats import Bytes
from fp4cast.parallel.progress import Advance, ignore

CHUNK_BYTES = 8 << 20  # bytes that one step of reading or copying holds in memory
COPY_BYTES = 64 << 20  # bytes that the kernel copies between two reports of progress
_POSIX = ("preadv", "pwrite", "geteuid", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK")  # where they are, fcntl is, too
AHEAD_BYTES = 128 << 10  # bytes of a file that the kernel reads ahead by itself, unless somebody has set more
MAX_OPEN = 16  # files that stay open: more than the shards that one step of the work looks into


def require_posix(path: Path) -> None:
    """Refuse to touch a file where the system lacks what that needs; the module can be imported everywhere.

    Raises:
        PlatformError: it does.
    """
    if lacks := [name for name in _POSIX if not hasattr(os, name)]:
        raise PlatformError(
            f"{path}: fp4cast reads and writes checkpoints with calls of POSIX, and Python on {sys.platform} has no "
            f"os.{lacks[0]}: use Linux, macOS 11 or newer, or on Windows its Subsystem for Linux (WSL)"
        )


class Buffer:
    """Reusable memory: each call returns a uint8 array, valid until the next call.

    Fresh memory costs a page fault for every 4 kB, which takes longer than reading them from the page cache.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def __call__(self, *shape: int) -> Bytes:
        """uint8 [*shape], not initialised."""
        size = math.prod(shape)
        if self._bytes.nbytes < size:
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].reshape(shape)


class Buffers(threading.local):
    """One thread's buffers, named by what they hold, so that sharing is visible.

    Attributes:
        source: codes of the source, or bytes of one of its tensors.
        exponents: E8M0 scales of the source.
        codes: codes of the destination, or bytes of one of its tensors.
        scales: E4M3 block scales.
        expected: the block scales that follow from the source.
        tile: a transposed tile.
        copy: bytes on their way between two files.
        compared: bytes of both sides.
    """

    def __init__(self) -> None:
        self.source = Buffer()
        self.exponents = Buffer()
        self.codes = Buffer()
        self.scales = Buffer()
        self.expected = Buffer()
        self.tile = Buffer()
        self.copy = Buffer()
        self.compared = Buffer()


BUFFERS = Buffers()


class File(Readable):
    """A file opened for reading ranges of it; a short read is an error, never a silent zero.

    Args:
        path: the file.
        follow: whether it may be a link.
        wait: whether to wait for a writer, if it is a pipe.
    """

    def __init__(self, path: Path, *, follow: bool = True, wait: bool = True) -> None:
        require_posix(path)
        flags = (0 if follow else os.O_NOFOLLOW) | (0 if wait else os.O_NONBLOCK)
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        self.path = path
        self.remote = is_remote(os.fstat(self.fd).st_dev)
        # Not os.close: on a disk that has gone it fails, where nobody may be there to catch that.
        self._close = weakref.finalize(self, os.closerange, self.fd, self.fd + 1)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the last reference that goes does so, too."""
        self._close()

    def read(self, start: int, nbytes: int, buffer: Buffer | None = None) -> Bytes:
        """Read bytes [start, start + nbytes) as uint8 [nbytes], into `buffer` if given."""
        out = np.empty(nbytes, np.uint8) if buffer is None else buffer(nbytes)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: Bytes) -> None:
        """Fill a contiguous array from `start` on."""
        view, done = out.data.cast("B"), 0
        self.announce(start, len(view))
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

    def rectangle(self, start: int, stride: int, lines: int, nbytes: int, buffer: Buffer) -> Bytes:
        """Read the first `nbytes` of each of `lines` lines that lie `stride` bytes apart: uint8 [lines, nbytes]."""
        out = buffer(lines, nbytes)
        if nbytes == stride:
            self.read_into(start, out)
            return out
        for i, line in enumerate(out):
            self.read_into(start + i * stride, line)
        return out

    def prefetch(self, start: int, nbytes: int) -> None:
        """Ask the kernel to begin reading bytes that are needed soon, all at the same time.

        For one call it reads no more than it reads ahead, so it is called for each part of that size.
        """
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is only advice
                for at in range(start, start + nbytes, AHEAD_BYTES):
                    os.posix_fadvise(self.fd, at, min(AHEAD_BYTES, start + nbytes - at), os.POSIX_FADV_WILLNEED)

    def announce(self, start: int, nbytes: int) -> None:
        """Prefetch what is read next from far; of a disk the kernel reads enough ahead by itself."""
        if self.remote and nbytes > AHEAD_BYTES:
            self.prefetch(start, nbytes)


class Files:
    """Files that threads share, opened when they are needed; only the last used stay open.

    A checkpoint may have more shards than the system lets a process open: 256 on macOS, 1,024 on most of Linux. A file
    that gives way to another is closed once no thread reads from it any more.
    """

    def __init__(self, limit: int = MAX_OPEN) -> None:
        self._limit = limit
        self._files: dict[Path, File] = {}  # the last used is the last
        self._lock = threading.Lock()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def __getitem__(self, path: Path) -> File:
        with self._lock:
            file = self._files.pop(path, None)
            if file is None:
                if len(self._files) >= self._limit:
                    del self._files[next(iter(self._files))]
                file = File(path)
            self._files[path] = file
            return file

    def prefetch(self, ranges: Iterable[tuple[Path, int, int]]) -> None:
        """See `ReadableFiles`."""
        for path, start, nbytes in merged(ranges):
            self[path].prefetch(start, min(nbytes, CHUNK_BYTES))


def copy_range(
    source: File,
    start: int,
    target: int,
    offset: int,
    nbytes: int,
    progress: Advance = ignore,
) -> None:
    """Copy bytes between files, inside the kernel if it can, else through one small buffer.

    From far it reads hardly ahead, and writes pieces that end within pages, which are read back later, one by one.

    Args:
        source: the file to read.
        start: first byte there.
        target: descriptor of the file to write.
        offset: where they go.
        nbytes: how many.
        progress: called with the number of bytes just copied; may raise to stop.
    """
    done, in_kernel = 0, not source.remote
    while done < nbytes:
        if in_kernel:
            got = _kernel_copy(source, start + done, target, offset + done, min(COPY_BYTES, nbytes - done))
            in_kernel = got > 0
        else:
            chunk = source.read(start + done, min(CHUNK_BYTES, nbytes - done), BUFFERS.copy)
            write_all(target, offset + done, chunk)
            got = len(chunk)
        done += got
        progress(got)


def _kernel_copy(source: File, start: int, target: int, offset: int, nbytes: int) -> int:
    """Copy inside the kernel; returns the bytes copied, 0 if it cannot copy between these files or the source ends."""
    if not hasattr(os, "copy_file_range"):
        return 0  # only Linux has it
    try:
        return os.copy_file_range(source.fd, target, nbytes, start, offset)
    except OSError:
        return 0  # the plain copy follows, and meets any real error again


def write_all(target: int, offset: int, data: Bytes) -> None:
    """Write all of `data` at `offset`."""
    view, done = data.data.cast("B"), 0
    while done < len(view):
        got = os.pwrite(target, view[done:], offset + done)
        if not got:
            raise OSError(errno.EIO, "no more bytes are taken")
        done += got


@contextlib.contextmanager
def created(path: Path, mode: int = 0o666) -> Iterator[int]:
    """The descriptor of a new or emptied file, for a `with` block; a link in its place is not followed.

    Args:
        path: the file, which errors name.
        mode: permissions of a new file, before the umask.
    """
    require_posix(path)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        yield target
    except OSError as error:
        error.filename = error.filename or str(path)  # a descriptor has no name
        raise
    finally:
        os.close(target)


def write_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a small file; where a disk takes no bytes this ends, and `Path.write_bytes` does not."""
    with created(path, mode) as target:
        write_all(target, 0, np.frombuffer(data, np.uint8))


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a small file atomically: it is there whole, or not at all."""
    beside = path.with_name(f"{path.name}.{os.urandom(4).hex()}.new")
    write_file(beside, data, mode)
    beside.replace(path)


def sync_path(path: Path) -> None:
    """Wait until a file's data, or a directory's entries, are on the disk; a file system that cannot is let be."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
