"""Comparing the values of an MXFP4 tensor with those of the NVFP4 tensor made from it, on what lies on disk.

This is part of the independent witness: it decodes with `formats` alone and shares no code with what casts. Equal codes
under equal scales are equal values; a half-block for which that does not hold is decoded on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fp4cast.files import CHUNK_BYTES, Files
from fp4cast.formats import E4M3, E8M0, E8M0_BIAS, Bytes, Float64s, mxfp4_values, nvfp4_values
from fp4cast.shards import Tensor
from fp4cast.sources import BLOCK_BYTES, Pair

__all__ = ["Comparison", "compare_bytes", "compare_pair"]

_SCALE_CODES = np.arange(0x01, 0x7F, dtype=np.uint8)  # positive finite E4M3
_NAN = 0x7F  # E4M3's NaN; from 0x80 on scales are negative
_MARLIN_SMALLEST = 0x08  # 2^-6, 14 binades below 2^8: vLLM's Marlin zeroes block scales below it
_TILE_BYTES = 16 << 20
_BATCH = 1 << 14  # blocks decoded to float64 together: 4 MB


@dataclass
class Comparison:
    """What was measured on one tensor.

    Attributes:
        verbatim: half-blocks with the source's codes and values.
        shifted: half-blocks with other codes and the same values.
        rounded: half-blocks with another value, or another sign of a zero.
        squared_error: sum over all weights.
        max_error: largest absolute difference; NaN where the destination holds one.
        energy: sum of the squares of the source's values (only where something is rounded).
        where: (block, element within it, expected, actual) of the first other value.
        stray: zero half-blocks whose scale is not the one that their exponent gives.
        invalid: half-blocks whose scale is NaN or negative.
        marlin_zeroed: half-blocks that hold a value and lie below the window of vLLM's Marlin kernels.
    """

    verbatim: int = 0
    shifted: int = 0
    rounded: int = 0
    squared_error: float = 0.0
    max_error: float = 0.0
    energy: float = 0.0
    where: tuple[int, int, float, float] | None = None
    stray: int = 0
    invalid: int = 0
    marlin_zeroed: int = 0


class _Part(NamedTuple):
    """Some blocks of both sides: indices [n], codes [n, 16], E8M0 [n]; codes [n, 16], E4M3 [n, 2]."""

    blocks: Callable[[int], int]
    source_codes: Bytes
    exponents: Bytes
    codes: Bytes
    scales: Bytes


@lru_cache(maxsize=1024)
def _scale_tables(tensor_scale: float, bias: int) -> tuple[Bytes, Bytes]:
    """For every E8M0 byte the E4M3 code that gives the same scale, two ways.

    Returns:
        uint8 [256] with 255 where no code does; and uint8 [256] for blocks of zeros, with the nearest power of two.
    """
    wanted = E8M0.values * 2.0 ** (E8M0_BIAS - bias)
    same = np.full(256, 0xFF, np.uint8)
    for code in _SCALE_CODES:
        same[wanted == E4M3.values[code] * tensor_scale] = code
    # Under a tensor scale that is no power of two a zero block's scale is that of its exponent alone.
    unit = tensor_scale if np.frexp(tensor_scale)[0] == 0.5 else 1.0
    clamped = np.clip(wanted / unit, 2.0**-9, 2.0**8)
    zero = np.array([_SCALE_CODES[E4M3.values[_SCALE_CODES] == value][0] if value == value else 0 for value in clamped])
    return same, zero.astype(np.uint8)


def _flat_parts(pair: Pair, codes: Tensor, scales: Tensor, files: Files) -> Iterator[_Part]:
    many = CHUNK_BYTES // BLOCK_BYTES
    for start in range(0, pair.blocks, many):
        n = min(many, pair.blocks - start)
        yield _Part(
            lambda i, start=start: start + i,  # type: ignore[misc]
            files[pair.codes.path].read(pair.codes.start + start * 16, n * 16).reshape(n, 16),
            files[pair.scales.path].read(pair.scales.start + start, n),
            files[codes.path].read(codes.start + start * 16, n * 16).reshape(n, 16),
            files[scales.path].read(scales.start + start * 2, n * 2).reshape(n, 2),
        )


def _transposed_parts(pair: Pair, codes: Tensor, scales: Tensor, files: Files) -> Iterator[_Part]:
    """Tiles of a bank whose destination is [E, K/2, N]: some rows of every column."""
    rows, width = pair.rows, pair.row_blocks
    step = max(1, min(rows, _TILE_BYTES // (width * 16)))
    for expert in range(pair.experts):
        for first in range(0, rows, step):
            n = min(step, rows - first)
            start = expert * rows * width + first * width

            def columns(tensor: Tensor, many: int, expert: int = expert, first: int = first, n: int = n) -> Bytes:
                base = tensor.start + expert * many * rows
                if n == rows:
                    matrix = files[tensor.path].read(base, many * rows).reshape(many, rows)
                else:
                    lines = [files[tensor.path].read(base + i * rows + first, n) for i in range(many)]
                    matrix = np.stack(lines)
                return np.ascontiguousarray(matrix.T)

            yield _Part(
                lambda i, start=start: start + i,  # type: ignore[misc]
                files[pair.codes.path].read(pair.codes.start + start * 16, n * width * 16).reshape(-1, 16),
                files[pair.scales.path].read(pair.scales.start + start, n * width),
                columns(codes, width * 16).reshape(-1, 16),
                columns(scales, width * 2).reshape(-1, 2),
            )


def compare_pair(
    pair: Pair,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: float,
    *,
    transposed: bool,
    files: Files,
    progress: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Compare every value of a source tensor with the destination's.

    Args:
        pair: the source's codes and scales.
        codes: the destination's codes, of the right shape and dtype.
        scales: its E4M3 block scales, likewise.
        tensor_scale: its tensor scale, a multiplier.
        transposed: the destination is [E, K/2, N].
        files: both sides' files.
        progress: called with the number of bytes just read.
    """
    same, zero = _scale_tables(tensor_scale, pair.bias)
    parts = _transposed_parts if transposed else _flat_parts
    found = Comparison()
    for part in parts(pair, codes, scales, files):
        _compare_part(part, same, zero, tensor_scale, pair.bias, found)
        progress(part.source_codes.nbytes + part.exponents.nbytes + part.codes.nbytes + part.scales.nbytes)
    if found.rounded:
        found.energy = sum(_energy(part, pair.bias) for part in parts(pair, codes, scales, files))
    return found


def _energy(part: _Part, bias: int) -> float:
    """Sum of the squares of the source's values."""
    total = 0.0
    for i in range(0, len(part.exponents), _BATCH):
        values = mxfp4_values(part.source_codes[i : i + _BATCH], part.exponents[i : i + _BATCH, None], bias)
        total += float((values**2).sum())
    return total


def _compare_part(part: _Part, same: Bytes, zero: Bytes, tensor_scale: float, bias: int, found: Comparison) -> None:
    if part.scales.min() < _MARLIN_SMALLEST:
        low = np.flatnonzero((part.scales < _MARLIN_SMALLEST).any(axis=1))
        holds = (part.codes[low].reshape(-1, 2, 8) & 0x77).any(axis=-1)
        found.marlin_zeroed += int((holds & (part.scales[low] < _MARLIN_SMALLEST)).sum())
    pairs = same.astype(np.uint16) * 0x0101
    expected = np.take(pairs, part.exponents, mode="clip").view(np.uint8).reshape(-1, 2)
    same_codes = _equal(part.source_codes, part.codes)
    # 255 in `expected` means that no scale is the same; it is NaN too, and must not equal a NaN that was written.
    invalid = int((part.scales >= _NAN).sum()) if part.scales.max() >= _NAN else 0
    found.invalid += invalid
    if same_codes and not invalid and _equal(expected, part.scales):
        found.verbatim += 2 * len(part.exponents)
        return
    other = (part.scales != expected) | (part.scales >= _NAN)
    if not same_codes:
        other |= (part.source_codes != part.codes).reshape(-1, 2, 8).any(axis=-1)
    odd = np.flatnonzero(other.any(axis=1))
    found.verbatim += 2 * (len(part.exponents) - len(odd))
    for i in range(0, len(odd), _BATCH):
        _compare_values(part, odd[i : i + _BATCH], zero, tensor_scale, bias, found)


def _equal(a: Bytes, b: Bytes) -> bool:
    """Whether two contiguous arrays of one size hold the same bytes; eight at a time where that divides."""
    if a.nbytes % 8 == 0:
        return np.array_equal(a.reshape(-1).view(np.uint64), b.reshape(-1).view(np.uint64))
    return np.array_equal(a, b)


def _compare_values(
    part: _Part, odd: np.ndarray, zero: Bytes, tensor_scale: float, bias: int, found: Comparison
) -> None:
    """Decode some blocks on both sides, as float64 [n, 2, 16]."""
    shape = (len(odd), 2, 16)
    expected = mxfp4_values(part.source_codes[odd], part.exponents[odd, None], bias).reshape(shape)
    actual = nvfp4_values(part.codes[odd], part.scales[odd], tensor_scale).reshape(shape)
    wrong = (expected != actual) | (np.signbit(expected) != np.signbit(actual))
    rounded = wrong.any(axis=-1)
    copied = (part.source_codes[odd] == part.codes[odd]).reshape(len(odd), 2, 8).all(axis=-1)
    found.rounded += int(rounded.sum())
    found.verbatim += int((copied & ~rounded).sum())
    found.shifted += int((~copied & ~rounded).sum())
    empty = ~expected.any(axis=-1) & ~rounded
    found.stray += int((empty & (part.scales[odd] != zero[part.exponents[odd]][:, None])).sum())
    if rounded.any():
        _measure(part, odd, expected, actual, wrong, found)


def _measure(
    part: _Part, odd: np.ndarray, expected: Float64s, actual: Float64s, wrong: np.ndarray, found: Comparison
) -> None:
    error = np.abs(expected - actual)
    found.squared_error += float((error**2).sum())
    found.max_error = float(np.maximum(found.max_error, error.max()))
    if found.where is None:
        at = int(np.argmax(wrong))
        block, element = divmod(at, 32)
        values = float(expected.reshape(-1)[at]), float(actual.reshape(-1)[at])
        found.where = (part.blocks(int(odd[block])), element, *values)


def compare_bytes(a: Tensor, b: Tensor, files: Files, progress: Callable[[int], None] = lambda _: None) -> int | None:
    """Position of the first byte in which two tensors of one size differ, or None."""
    for start in range(0, a.nbytes, CHUNK_BYTES):
        n = min(CHUNK_BYTES, a.nbytes - start)
        left, right = files[a.path].read(a.start + start, n), files[b.path].read(b.start + start, n)
        if not _equal(left, right):
            return start + int(np.argmax(left != right))
        progress(2 * n)
    return None
