"""Checksums of files: XXH3 of 128 bits over pieces, which workers can share.

A file's checksum is the XXH3-128 of the XXH3-128 digests of its 64-MiB pieces, one after the other. It finds what disks
and copies do to a file; whoever may write the file may also write its checksum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from fp4cast.checkpoints.byte_ranges import BUFFERS, File
from fp4cast.formats import Bytes
from fp4cast.parallel.progress import Advance, ignore

PIECE_BYTES = 64 << 20
_STEP_BYTES = 1 << 20  # bytes that stay in the processor's cache between reading and hashing

Map = Callable[[Callable[[int], bytes], Iterable[int]], Iterator[bytes]]


class Checksum(NamedTuple):
    """What is noted of a file.

    Attributes:
        bytes: its size.
        xxh3: its checksum, in hexadecimal digits.
    """

    bytes: int
    xxh3: str

    def __str__(self) -> str:
        return f"{self.bytes} bytes of checksum {self.xxh3}"


def checksum(file: File, map_: Map = map, progress: Advance = ignore) -> Checksum:
    """The checksum of an open file.

    Args:
        file: read from its first byte to its last.
        map_: applies a function to the starts of pieces; a pool's, to share the work.
        progress: called with the number of bytes just read, maybe from other threads; may raise to stop.
    """
    size = os.fstat(file.fd).st_size

    def steps(start: int) -> Iterator[Bytes]:
        end = min(start + PIECE_BYTES, size)
        for at in range(start, end, _STEP_BYTES):
            yield file.read(at, min(_STEP_BYTES, end - at), BUFFERS.copy)
            progress(min(_STEP_BYTES, end - at))

    def digest(start: int) -> bytes:
        state = xxhash.xxh3_128()
        for step in steps(start):
            state.update(step.data)
        return state.digest()

    return _joined(size, map_(digest, range(0, size, PIECE_BYTES)))


def checksum_of_bytes(data: bytes) -> Checksum:
    """The checksum of a file with these contents."""
    pieces = (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))
    return _joined(len(data), map(xxhash.xxh3_128_digest, pieces))


def checksum_of_path(path: Path, map_: Map = map, progress: Advance = ignore) -> Checksum:
    """The checksum of a file; arguments as in `checksum`.

    Raises:
        CheckpointError: it cannot be read.
    """
    with File(path) as file:
        return checksum(file, map_, progress)


def _joined(size: int, digests: Iterable[bytes]) -> Checksum:
    return Checksum(size, xxhash.xxh3_128_hexdigest(b"".join(digests)))
