"""Transpose matrices of bytes: compiled where the package was built with a C compiler, by NumPy elsewhere.

Conversion and verification share this kernel, so it is checked against NumPy when loaded.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fp4cast.formats import Bytes

LIBRARY = Path(__file__).with_name("_transpose.so")  # made by hatch_build.py from transpose.c

Call = Callable[[int | None, int, int, int, int | None, int], int]


@dataclass(frozen=True)
class Kernel:
    """The functions of transpose.c."""

    write: Call
    compare: Call


def transpose(matrix: Bytes, out: Bytes) -> None:
    """Write a matrix's transpose.

    Args:
        matrix: uint8 [rows, columns]; each row contiguous.
        out: uint8 [columns, rows]; each row contiguous; it must not overlap `matrix`.

    Raises:
        ValueError: the shapes do not match.
    """
    if _fits(matrix, out) and _KERNEL is not None:
        _call(_KERNEL.write, matrix, out)
    else:
        out[:] = matrix.T


def is_transpose(matrix: Bytes, other: Bytes) -> bool:
    """Whether a matrix uint8 [columns, rows] is the transpose of another; arguments and errors as in `transpose`."""
    if _fits(matrix, other) and _KERNEL is not None:
        return bool(_call(_KERNEL.compare, matrix, other))
    return np.array_equal(matrix.T, other)


def compiled() -> bool:
    """Whether the compiled kernel is in use."""
    return _KERNEL is not None


def compiled_comparison() -> Call | None:
    """The function of transpose.c that compares, for other C code; None if it is not in use."""
    return _KERNEL.compare if _KERNEL is not None else None


def _fits(matrix: Bytes, other: Bytes) -> bool:
    """Whether the compiled kernel takes these matrices."""
    if other.shape != matrix.shape[::-1]:
        raise ValueError(f"the transpose of {matrix.shape} has the shape {matrix.shape[::-1]}, not {other.shape}")
    return all(
        each.dtype == np.uint8 and each.strides[1] == 1 and each.strides[0] >= each.shape[1] for each in (matrix, other)
    )


def _call(function: Call, matrix: Bytes, other: Bytes) -> int:
    rows, columns = matrix.shape
    return function(matrix.ctypes.data, rows, columns, matrix.strides[0], other.ctypes.data, other.strides[0])


def _correct(kernel: Kernel) -> bool:
    """Whether the kernel agrees with NumPy on squares and remainders; two matrices tell all positions apart."""
    index = np.arange(53 * 83).reshape(53, 83)
    for digit in (index % 251, index // 251):
        matrix, whole = digit.astype(np.uint8), np.zeros((83, 60), np.uint8)
        out = whole[:, :53]
        _call(kernel.write, matrix, out)
        if not np.array_equal(out, matrix.T) or whole[:, 53:].any() or not _call(kernel.compare, matrix, out):
            return False
        for row, column in ((0, 0), (31, 17), (47, 79), (52, 5), (20, 82)):  # squares, both edges
            out[column, row] ^= 1
            if _call(kernel.compare, matrix, out):
                return False
            out[column, row] ^= 1
    return True


def _load() -> Kernel | None:
    """Load the kernel; None if it is missing or wrong, or if `FP4CAST_NO_KERNEL` turns it off."""
    if os.environ.get("FP4CAST_NO_KERNEL"):
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        kernel = Kernel(library.fp4cast_transpose, library.fp4cast_is_transpose)
    except (OSError, AttributeError):
        return None
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    for function, result in ((kernel.write, None), (kernel.compare, ctypes.c_int)):
        function.argtypes, function.restype = [pointer, size, size, size, pointer, size], result  # type: ignore[attr-defined]
    return kernel if _correct(kernel) else None


_KERNEL = _load()
