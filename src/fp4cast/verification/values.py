"""Compare the values of MXFP4 blocks with those of the NVFP4 blocks made from them, decoded with `formats` alone.

Equal codes under equal scales are equal values; a half-block for which that does not hold is decoded on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fp4cast.checkpoints.byte_ranges import BUFFERS
from fp4cast.formats import (
    E4M3,
    E8M0,
    E8M0_BIAS,
    MX_BLOCK,
    NV_BLOCK,
    NV_BLOCK_BYTES,
    Bytes,
    Float64s,
    mxfp4_values,
    nvfp4_values,
)
from fp4cast.verification.compiled import NOT_PLAIN, Pairs
from fp4cast.verification.rounding import Nearness, find_far

_SCALE_CODES = np.arange(0x01, 0x7F, dtype=np.uint8)  # positive finite E4M3
_NAN = 0x7F  # E4M3's NaN; from 0x80 on scales are negative
_MARLIN_SMALLEST = 0x08  # 2^-6, 14 binades below 2^8: vLLM's Marlin zeroes block scales below it
_BATCH = 1 << 14  # blocks decoded to float64 together: 4 MB


@dataclass
class Comparison:
    """The figures measured on one tensor.

    Attributes:
        verbatim: half-blocks with the source's codes and values.
        shifted: half-blocks with other codes and the same values.
        rounded: half-blocks with another value, or another sign of a zero.
        signs: those of them with no other value, but another sign of a zero.
        squared_error: sum over all weights.
        max_error: largest absolute difference; NaN where the destination holds one.
        energy: sum of the squares of the source's values (only where something is rounded).
        where: (block, element within it, expected, actual) of the first other value.
        stray: zero half-blocks whose scale is not the one that their exponent gives.
        invalid: half-blocks whose scale is NaN or negative.
        marlin_zeroed: half-blocks that hold a value and lie below the window of vLLM's Marlin kernels.
        nearness: of the rounded half-blocks; None where it is not asked for.
        zeros: every code of the source is a zero.
    """

    verbatim: int = 0
    shifted: int = 0
    rounded: int = 0
    signs: int = 0
    squared_error: float = 0.0
    max_error: float = 0.0
    energy: float = 0.0
    where: tuple[int, int, float, float] | None = None
    stray: int = 0
    invalid: int = 0
    marlin_zeroed: int = 0
    nearness: Nearness | None = None
    zeros: bool = True

    def merge(self, other: Comparison) -> None:
        """Add the figures of later blocks of the same tensor."""
        self.verbatim += other.verbatim
        self.shifted += other.shifted
        self.rounded += other.rounded
        self.signs += other.signs
        self.squared_error += other.squared_error
        self.energy += other.energy
        self.stray += other.stray
        self.invalid += other.invalid
        self.marlin_zeroed += other.marlin_zeroed
        self.zeros &= other.zeros
        self.max_error = float(np.maximum(self.max_error, other.max_error))
        self.where = self.where or other.where
        if other.nearness is not None:
            self.nearness = self.nearness or Nearness()
            self.nearness.merge(other.nearness)

    def see_codes(self, codes: Bytes) -> None:
        """Look for a value among some codes of the source; the first few nearly always hold one."""
        if self.zeros:
            flat = codes.reshape(-1)
            self.zeros = not (flat[:64] & 0x77).any() and not (flat & 0x77).any()


class Blocks(NamedTuple):
    """Some blocks of both sides.

    Attributes:
        position: the number of block i in its tensor.
        source_codes: packed uint8 [n, 16].
        exponents: E8M0 uint8 [n].
        codes: of the destination, packed uint8 [n, 16].
        scales: of the destination, E4M3 uint8 [n, 2].
    """

    position: Callable[[int], int]
    source_codes: Bytes
    exponents: Bytes
    codes: Bytes
    scales: Bytes


@dataclass(frozen=True)
class ScaleTables:
    """The block scales that a tensor must have, as tables.

    Attributes:
        tensor_scale: the destination's multiplier.
        bias: exponent k is a scale byte minus this.
        same: uint8 [256], for every E8M0 byte the E4M3 code of the same scale; 255 where there is none.
        zero: uint8 [256], for blocks of zeros, with the nearest power of two instead.
        pairs: uint32 [256], `same` twice as one number; `NOT_PLAIN` where it is none or so small that Marlin loses it.
    """

    tensor_scale: float
    bias: int
    same: Bytes
    zero: Bytes
    pairs: Pairs

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(tensor_scale: float, bias: int) -> ScaleTables:
        """The tables for a tensor scale."""
        wanted = E8M0.values * 2.0 ** (E8M0_BIAS - bias)
        same = np.full(256, 0xFF, np.uint8)
        for code in _SCALE_CODES:
            same[wanted == E4M3.values[code] * tensor_scale] = code
        # Under a tensor scale that is not a power of two, a zero block's scale is that of its exponent alone.
        unit = tensor_scale if np.frexp(tensor_scale)[0] == 0.5 else 1.0
        clamped = np.clip(wanted / unit, 2.0**-9, 2.0**8)
        zero = [_SCALE_CODES[E4M3.values[_SCALE_CODES] == value][0] if value == value else 0 for value in clamped]
        plain = (same >= _MARLIN_SMALLEST) & (same < _NAN)
        pairs = np.where(plain, 0x0101 * same.astype(np.uint32), np.uint32(NOT_PLAIN))
        return ScaleTables(tensor_scale, bias, same, np.array(zero, np.uint8), pairs)

    def expected(self, exponents: Bytes) -> Bytes:
        """E8M0 uint8 [n] -> the E4M3 bytes of both half-blocks, uint8 [n, 2]."""
        twice = BUFFERS.expected(2 * exponents.size).view(np.uint16)
        twice[:] = np.frombuffer(exponents.tobytes().translate(self.same.tobytes()), np.uint8)
        twice *= np.uint16(0x0101)
        return twice.view(np.uint8).reshape(-1, 2)


def plain(scales: Bytes) -> bool:
    """Whether no scale is NaN, negative, or so small that Marlin kernels lose it."""
    return bool(scales.min() >= _MARLIN_SMALLEST and scales.max() < _NAN)


def equal(a: Bytes, b: Bytes) -> bool:
    """Whether two arrays of one shape hold the same bytes, compared eight at a time where the length allows it.

    The last axis of both must be contiguous.
    """
    if a.shape[-1] % 8 == 0:
        return np.array_equal(a.view(np.uint64), b.view(np.uint64))
    return np.array_equal(a, b)


def compare_blocks(blocks: Blocks, tables: ScaleTables, found: Comparison) -> None:
    """Compare some blocks, code by code and scale by scale, and add what differs to `found`."""
    if blocks.scales.min() < _MARLIN_SMALLEST:
        low = np.flatnonzero((blocks.scales < _MARLIN_SMALLEST).any(axis=1))
        holds = (blocks.codes[low].reshape(-1, 2, NV_BLOCK_BYTES) & 0x77).any(axis=-1)
        found.marlin_zeroed += int((holds & (blocks.scales[low] < _MARLIN_SMALLEST)).sum())
    # 255 in `expected` means that no scale is the same; it is NaN too, and must not equal a NaN that was written.
    invalid = blocks.scales >= _NAN
    found.invalid += int(invalid.sum())
    other = (blocks.scales != tables.expected(blocks.exponents)) | invalid
    other |= (blocks.source_codes != blocks.codes).reshape(-1, 2, NV_BLOCK_BYTES).any(axis=-1)
    odd = np.flatnonzero(other.any(axis=1))
    found.verbatim += 2 * (len(blocks.exponents) - len(odd))
    for i in range(0, len(odd), _BATCH):
        _compare_values(blocks, odd[i : i + _BATCH], tables, found)


def energy(codes: Bytes, exponents: Bytes, bias: int) -> float:
    """Sum of the squares of MXFP4 values: packed uint8 [n, 16] with E8M0 uint8 [n]."""
    total = 0.0
    for i in range(0, len(exponents), _BATCH):
        values = mxfp4_values(codes[i : i + _BATCH], exponents[i : i + _BATCH, None], bias)
        total += float((values**2).sum())
    return total


def _compare_values(blocks: Blocks, odd: np.ndarray, tables: ScaleTables, found: Comparison) -> None:
    """Decode some blocks on both sides, as float64 [n, 2, 16]."""
    shape = (len(odd), 2, NV_BLOCK)
    expected = mxfp4_values(blocks.source_codes[odd], blocks.exponents[odd, None], tables.bias).reshape(shape)
    actual = nvfp4_values(blocks.codes[odd], blocks.scales[odd], tables.tensor_scale).reshape(shape)
    wrong = (expected != actual) | (np.signbit(expected) != np.signbit(actual))
    rounded = wrong.any(axis=-1)
    copied = (blocks.source_codes[odd] == blocks.codes[odd]).reshape(len(odd), 2, NV_BLOCK_BYTES).all(axis=-1)
    found.rounded += int(rounded.sum())
    found.signs += int((rounded & (expected == actual).all(axis=-1)).sum())
    found.verbatim += int((copied & ~rounded).sum())
    found.shifted += int((~copied & ~rounded).sum())
    empty = ~expected.any(axis=-1) & ~rounded
    found.stray += int((empty & (blocks.scales[odd] != tables.zero[blocks.exponents[odd]][:, None])).sum())
    if rounded.any():
        _measure(blocks, odd, expected, actual, wrong, found)
        if found.nearness is not None:
            found.nearness.merge(_nearness(blocks, odd, rounded, tables))


def _nearness(blocks: Blocks, odd: np.ndarray, rounded: np.ndarray, tables: ScaleTables) -> Nearness:
    """Judge the rounded ones among some half-blocks, bool [n, 2]."""
    which, half = np.nonzero(rounded)
    at = odd[which]
    source, written = (codes.reshape(-1, 2, NV_BLOCK_BYTES)[at, half] for codes in (blocks.source_codes, blocks.codes))
    k = blocks.exponents[at].astype(np.int64) - tables.bias
    far = find_far(source, k, written, blocks.scales[at, half], tables.tensor_scale)
    if not far:
        return Nearness()
    first = far[0].at
    return Nearness(len(far), (blocks.position(int(at[first])), int(half[first]), far[0].squared_error, far[0].least))


def _measure(
    blocks: Blocks, odd: np.ndarray, expected: Float64s, actual: Float64s, wrong: np.ndarray, found: Comparison
) -> None:
    error = np.abs(expected - actual)
    found.squared_error += float((error**2).sum())
    found.max_error = float(np.maximum(found.max_error, error.max()))
    if found.where is None:
        at = int(np.argmax(wrong))
        block, element = divmod(at, MX_BLOCK)
        values = float(expected.reshape(-1)[at]), float(actual.reshape(-1)[at])
        found.where = (blocks.position(int(odd[block])), element, *values)
