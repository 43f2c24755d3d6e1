"""Transposes matrices of bytes: compiled where the package was built with a C compiler, by NumPy elsewhere.

Who casts and who verifies both use it, so a wrong kernel could hide from both: it is checked against NumPy when loaded.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fp4cast.formats import Bytes

__all__ = ["LIBRARY", "compiled", "transpose"]

LIBRARY = Path(__file__).with_name("_transpose.so")  # made by hatch_build.py from transpose.c

Kernel = Callable[[int | None, int, int, int, int | None, int], None]


def transpose(matrix: Bytes, out: Bytes) -> None:
    """Write a matrix's transpose.

    Args:
        matrix: uint8 [rows, columns]; each row contiguous.
        out: uint8 [columns, rows]; each row contiguous, and no part of `matrix`.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if out.shape != matrix.shape[::-1]:
        raise ValueError(f"the transpose of {matrix.shape} has the shape {matrix.shape[::-1]}, not {out.shape}")
    if _KERNEL is None or not (_lined(matrix) and _lined(out)):
        out[:] = matrix.T
    else:
        _turn(_KERNEL, matrix, out)


def compiled() -> bool:
    """Whether the kernel is used."""
    return _KERNEL is not None


def _lined(matrix: Bytes) -> bool:
    return matrix.dtype == np.uint8 and matrix.strides[1] == 1 and matrix.strides[0] >= matrix.shape[1]


def _turn(kernel: Kernel, matrix: Bytes, out: Bytes) -> None:
    rows, columns = matrix.shape
    kernel(matrix.ctypes.data, rows, columns, matrix.strides[0], out.ctypes.data, out.strides[0])


def _correct(kernel: Kernel) -> bool:
    """Whether the kernel turns a matrix of squares and remainders as NumPy does: twice, so that no two bytes agree."""
    index = np.arange(53 * 83).reshape(53, 83)
    for digit in (index % 251, index // 251):
        matrix, out = digit.astype(np.uint8), np.zeros((83, 60), np.uint8)
        _turn(kernel, matrix, out[:, :53])
        if not np.array_equal(out[:, :53], matrix.T) or out[:, 53:].any():
            return False
    return True


def _load() -> Kernel | None:
    """The kernel; None where there is none, it is wrong, or `FP4CAST_NO_KERNEL` asks to do without."""
    if os.environ.get("FP4CAST_NO_KERNEL"):
        return None
    try:
        kernel = ctypes.CDLL(str(LIBRARY)).fp4cast_transpose
    except (OSError, AttributeError):
        return None
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    kernel.argtypes, kernel.restype = [pointer, size, size, size, pointer, size], None
    return kernel if _correct(kernel) else None


_KERNEL = _load()
