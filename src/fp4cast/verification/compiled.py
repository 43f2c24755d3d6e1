"""Compare ranges of two files: compiled where there was a C compiler; elsewhere the caller does it all.

It only says how far two ranges are plainly equal. What is not, and what cannot be read, the caller reads again, decodes
and judges. When loaded it is checked against NumPy on files of its own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from fp4cast.checkpoints.byte_ranges import BUFFERS, File
from fp4cast.checkpoints.transpose import compiled_comparison
from fp4cast.formats import MX_BLOCK_BYTES, Bytes

LIBRARY = Path(__file__).with_name("_compare.so")  # made by hatch_build.py from compare.c
STEP = 1 << 13  # blocks that are compared together: 128 kB of codes of each side stay in the L2 cache
NOT_PLAIN = 1 << 16  # an expected pair of scales that no pair equals

Pairs = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True)
class Kernel:
    """The functions of compare.c."""

    same_bytes: Callable[..., int]
    same_blocks: Callable[..., int]
    same_turned: Callable[..., int]


class Place(NamedTuple):
    """Where bytes lie: a file, and the first of them there."""

    file: File
    at: int


class _Place(ctypes.Structure):
    """The same for C."""

    _fields_ = (("file", ctypes.c_int64), ("at", ctypes.c_int64))


def step_of(blocks: int) -> int:
    """How many of some blocks the caller decodes together, where they are not plainly equal."""
    return min(blocks, STEP) if kernel() is not None else blocks


def same_bytes(a: Place, b: Place, nbytes: int) -> int:
    """How many bytes of two ranges are equal, from the first on, rounded down to a step; 0 without a kernel."""
    if (loaded := kernel()) is None:
        return 0
    step = STEP * MX_BLOCK_BYTES
    room = BUFFERS.compared(2 * step)
    return loaded.same_bytes(*(_Place(place.file.fd, place.at) for place in (a, b)), nbytes, room.ctypes.data, step)


def same_blocks(
    places: tuple[Place, Place, Place, Place], blocks: int, expected: Pairs, *, zeros: bool
) -> tuple[int, bool]:
    """How many blocks have the source's codes and the expected scales, from the first on, rounded down to a step.

    Args:
        places: of the source's codes and exponents, and of the codes and block scales made from them.
        blocks: how many.
        expected: uint32 [256], by exponent byte: both block scales as one 16-bit number, or `NOT_PLAIN`.
        zeros: every code of the source has been a zero so far.

    Returns:
        The number, 0 without a kernel; and whether every code of theirs is a zero, too.
    """
    if (loaded := kernel()) is None:
        return 0, zeros
    room, values = BUFFERS.compared(STEP * (2 * MX_BLOCK_BYTES + 3)), ctypes.c_int(not zeros)
    given = (_Place(place.file.fd, place.at) for place in places)
    same = loaded.same_blocks(*given, blocks, expected.ctypes.data, room.ctypes.data, STEP, values)
    return same, not values.value


def same_turned(
    places: tuple[Place, Place], stride: int, made: tuple[Bytes, Bytes], step: int, expected: Pairs, *, zeros: bool
) -> tuple[int, bool]:
    """How many rows of blocks lie turned in memory with the expected scales, from the first on, rounded down to a step.

    Args:
        places: of the source's codes and exponents.
        stride: blocks from one of its rows to the next.
        made: its counterparts: codes uint8 [16 W, rows] and block scales uint8 [2 W, rows], alike in their strides.
        step: rows that are compared together.
        expected: see `same_blocks`.
        zeros: see `same_blocks`.

    Returns:
        The number of rows, 0 without a kernel; and whether every code of theirs is a zero, too.
    """
    loaded, turned, (codes, scales) = kernel(), compiled_comparison(), made
    width, rows = len(scales) // 2, scales.shape[1]
    if loaded is None or turned is None or codes.strides != scales.strides or codes.strides[1] != 1:
        return 0, zeros
    room, values = BUFFERS.compared(step * width * (MX_BLOCK_BYTES + 3)), ctypes.c_int(not zeros)
    same = loaded.same_turned(
        *(_Place(place.file.fd, place.at) for place in places),
        *(rows, width, stride, codes.ctypes.data, scales.ctypes.data, codes.strides[0]),
        *(expected.ctypes.data, room.ctypes.data, step, ctypes.cast(turned, ctypes.c_void_p), values),  # type: ignore[arg-type]
    )
    return same, not values.value


@cache
def kernel() -> Kernel | None:
    """The kernel, loaded when it is first needed; None if it is missing or wrong, or `FP4CAST_NO_KERNEL` is set."""
    if os.environ.get("FP4CAST_NO_KERNEL"):
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        found = Kernel(library.fp4cast_same_bytes, library.fp4cast_same_blocks, library.fp4cast_same_turned)
    except (OSError, AttributeError):
        return None
    size, memory, place, flag = ctypes.c_size_t, ctypes.c_void_p, ctypes.POINTER(_Place), ctypes.POINTER(ctypes.c_int)
    of_blocks = [size, memory, memory, size, flag]
    of_rows = [size, size, size, memory, memory, size, memory, memory, size, memory, flag]
    arguments = ([place] * 2 + [size, memory, size], [place] * 4 + of_blocks, [place] * 2 + of_rows)
    functions: list[Any] = [found.same_bytes, found.same_blocks, found.same_turned]
    for function, types in zip(functions, arguments, strict=True):
        function.argtypes, function.restype = types, ctypes.c_int64
    return found if _correct(found) else None


def _correct(found: Kernel) -> bool:
    """Whether the kernel finds each of some differences, and nothing else."""
    try:
        with _scratch() as a, _scratch() as b:
            files = [file.fileno() for file in (a, b)]
            return _finds_in_files(found, files) and (compiled_comparison() is None or _finds_turned(found, files[0]))
    except (OSError, AttributeError):  # nowhere to write, or no POSIX
        return False


def _scratch() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("fp4cast"), "r+b")
    import tempfile  # slow to load

    return tempfile.TemporaryFile()


def _expected(exponents: int) -> Pairs:
    """A table for exponent bytes below some number, each of which is its own scale."""
    return np.where(np.arange(256) < exponents, 0x0101 * np.arange(256), NOT_PLAIN).astype(np.uint32)


def _finds_in_files(found: Kernel, files: list[int]) -> bool:
    blocks, size = 37, MX_BLOCK_BYTES
    exponents, codes, end = np.arange(blocks, dtype=np.uint8), np.arange(blocks * size) % 251, blocks * size
    sides = [np.concatenate([codes, exponents]), np.concatenate([codes, np.repeat(exponents, 2)])]
    sides, expected = [each.astype(np.uint8) for each in sides], _expected(blocks)
    # (the side that is changed, the byte, the blocks in whose steps the bytes differ, and the values)
    changes = [(0, end + at, blocks, at) for at in (0, 36)] + [(1, end + at, blocks, at // 2) for at in (1, 14, 73)]
    changes += [(side, at, at // size, at // size) for side in (0, 1) for at in (0, 127, 128, end - 1)]
    fine = _stops(found, files, [each * 0 for each in sides], expected) == (end, blocks, 0)
    fine = fine and _stops(found, files, sides, expected) == (end, blocks, 1)
    for side, at, *stops in changes:
        changed = [each.copy() for each in sides]
        changed[side][at] ^= 0x80
        begins = [stop // 8 * 8 if stop < blocks else blocks for stop in stops]
        fine = fine and _stops(found, files, changed, expected)[:2] == (begins[0] * size, begins[1])
    return fine


def _finds_turned(found: Kernel, file: int) -> bool:
    rows, width, stride, size = 19, 2, 3, MX_BLOCK_BYTES
    codes = (np.arange(rows * stride * size) % 251).astype(np.uint8).reshape(rows, -1)
    exponents = np.arange(rows * stride, dtype=np.uint8).reshape(rows, -1)
    inside = [codes[:, size:], np.repeat(exponents[:, 1:], 2, axis=1)]
    made = [np.ascontiguousarray(each.T) for each in inside]

    def stop(source: list[Bytes], made: list[Bytes]) -> tuple[int, int]:
        """Where it stops, in steps of four rows; and whether the source holds a value."""
        os.pwrite(file, b"".join(each.tobytes() for each in source), 0)
        places = (_Place(file, size), _Place(file, codes.nbytes + 1))
        room, values = np.zeros(4 * width * (size + 3), np.uint8), ctypes.c_int(0)
        turned = ctypes.cast(compiled_comparison(), ctypes.c_void_p)  # type: ignore[arg-type]
        *matrices, table = made[0].ctypes.data, made[1].ctypes.data, _expected(rows * stride)
        given = (rows, width, stride, *matrices, rows, table.ctypes.data, room.ctypes.data, 4, turned, values)
        return found.same_turned(*places, *given), values.value

    fine = stop([codes, exponents], made) == (rows, 1)
    fine = fine and stop([codes * 0, exponents * 0], [each * 0 for each in made]) == (rows, 0)
    for row in (0, 3, 4, 18):
        for which, column in ((0, size), (0, stride * size - 1), (1, 1), (1, 2)):
            source = [codes.copy(), exponents.copy()]
            source[which][row, column] ^= 0x80
            fine = fine and stop(source, made)[0] == row // 4 * 4
        for which, line in ((0, 0), (0, 31), (1, 0), (1, 3)):
            other = [each.copy() for each in made]
            other[which][line, row] ^= 1
            fine = fine and stop([codes, exponents], other)[0] == row // 4 * 4
    return fine


def _stops(found: Kernel, files: list[int], sides: list[Bytes], expected: Pairs) -> tuple[int, int, int]:
    """Where both functions stop, in bytes and in blocks, in steps of eight; and whether the source holds a value."""
    blocks, size, values, room = 37, MX_BLOCK_BYTES, ctypes.c_int(0), np.zeros(8 * (2 * MX_BLOCK_BYTES + 3), np.uint8)
    for file, side in zip(files, sides, strict=True):
        os.pwrite(file, side.tobytes(), 0)
    end, (a, b) = blocks * size, files
    codes, exponents, new_codes, scales = (_Place(*each) for each in ((a, 0), (a, end), (b, 0), (b, end)))
    in_bytes = found.same_bytes(codes, new_codes, end, room.ctypes.data, 8 * size)
    in_blocks = found.same_blocks(
        codes, exponents, new_codes, scales, blocks, expected.ctypes.data, room.ctypes.data, 8, values
    )
    return in_bytes, in_blocks, values.value
