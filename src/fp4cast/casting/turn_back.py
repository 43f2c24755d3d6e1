"""The way back: NVFP4 blocks as MXFP4 ones with the same values, where there are such.

Two half-blocks with scales s0 * S and s1 * S are an MXFP4 block of exponent k if all 32 values are magnitudes of E2M1
times 2^k. By the facts of the tight rule s * S must be a power of two, or three times one in a half-block whose codes
are powers of two; then the exponents that hold a half-block's values are an interval, and a block's are what both
halves allow. Blocks whose halves have one scale, a power of two, keep their codes: all that exact casts write.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fp4cast.casting.tight_rule import Ints, half_masks
from fp4cast.formats import E2M1, E4M3, E8M0_BIAS, MX_BLOCK_BYTES, NV_BLOCK_BYTES, Bytes, pack, unpack

NONE = 0xFF  # no E8M0 byte is the same scale
_FAR = 1 << 16  # bounds of a half-block of zeros, which every exponent holds
_SHIFTS = range(-4, 6)
_MAGNITUDES = [E2M1.decode(code) for code in range(8)]
_ODD = (1.0, 3.0)


def _turned(odd: float, a: int) -> list[int]:
    """The code of every magnitude times `odd` / 2^a; NONE where it is no magnitude."""
    values = [magnitude * odd / 2.0**a for magnitude in _MAGNITUDES]
    return [_MAGNITUDES.index(value) if value in _MAGNITUDES else NONE for value in values]


def _bounds(odd: float, mask: int) -> tuple[int, int]:
    """(smallest, largest) a for which magnitudes times `odd` / 2^a are magnitudes; crossed if there is none."""
    members = [i for i in range(1, 8) if mask >> i & 1]
    if not members:
        return -_FAR, _FAR
    allowed = [a for a in _SHIFTS if all(_turned(odd, a)[i] != NONE for i in members)]
    return (min(allowed), max(allowed)) if allowed else (_FAR, -_FAR)


# [odd part is 3, a + 4, magnitude code]; [odd part is 3, mask >> 1, (smallest, largest)].
_CODES = np.array([[_turned(odd, a) for a in _SHIFTS] for odd in _ODD], np.uint8)
_BOUNDS = np.array([[_bounds(odd, mask) for mask in range(0, 256, 2)] for odd in _ODD], np.int64)


@dataclass(frozen=True)
class TurnedBack:
    """MXFP4 blocks.

    Attributes:
        codes: packed uint8 [n, 16].
        exponents: E8M0 uint8 [n].
        changed: half-blocks whose codes are not those of the NVFP4 blocks.
        lost: indices of the blocks whose values no MXFP4 block holds; what stands there means nothing.
    """

    codes: Bytes
    exponents: Bytes
    changed: int
    lost: Ints


@lru_cache(maxsize=1024)
def exponent_table(tensor_scale: float, bias: int = E8M0_BIAS) -> Bytes:
    """uint8 [256], read-only: for every E4M3 code s the E8M0 byte of s * S; `NONE` where there is none."""
    fraction, exponent = np.frexp(E4M3.values * tensor_scale)
    byte = exponent - 1 + bias
    valid = (fraction == 0.5) & (byte >= 0) & (byte < NONE)
    return np.frombuffer(np.where(valid, byte, NONE).astype(np.uint8).tobytes(), np.uint8)


def exponent_bytes(block_scales: Bytes, table: Bytes) -> Bytes | None:
    """The E8M0 bytes uint8 [n] of blocks by their scales uint8 [n, 2]; None unless all of them keep their codes."""
    twice = np.ascontiguousarray(block_scales).reshape(-1).view(np.uint16)
    first = twice.astype(np.uint8)  # the low byte on this machine: whichever, both are compared
    if not np.array_equal(first * np.uint16(0x0101), twice):
        return None
    found = first.tobytes().translate(table.tobytes())
    return None if NONE in found else np.frombuffer(found, np.uint8)


def turn_back(
    codes: Bytes,
    block_scales: Bytes,
    tensor_scale: float,
    bias: int = E8M0_BIAS,
    known: tuple[Ints, Bytes] | None = None,
) -> TurnedBack:
    """Find MXFP4 blocks with the values of NVFP4 ones, the sign of zero included.

    Where several have them, the one whose codes are those of the NVFP4 block prevails, then the one of the smallest
    exponent, whose codes are the largest, as quantizers choose them.

    Args:
        codes: packed uint8 [n, 16].
        block_scales: E4M3 uint8 [n, 2].
        tensor_scale: S.
        bias: exponent bias of the E8M0 bytes.
        known: (indices, E8M0 bytes) of blocks whose exponents are known; those that cannot have them are lost.
    """
    told = exponent_table(tensor_scale, bias)[block_scales]
    differ = (told[:, 0] != told[:, 1]) | (told[:, 0] == NONE)
    exponents, out = told[:, 0].copy(), codes
    if known is not None:
        differ[known[0]] = True
    odd = np.flatnonzero(differ)
    if not odd.size:
        return TurnedBack(out, exponents, 0, odd)
    halves, scales = codes[odd].reshape(-1, 2, NV_BLOCK_BYTES), block_scales[odd]
    halves = np.where((scales == 0)[..., None], halves & 0x88, halves)  # a scale of 0 leaves only signs
    masks = half_masks(halves)
    three, power = _parts(scales, masks, tensor_scale)
    low, high = (_BOUNDS[three.clip(0), masks >> 1, side] + power for side in (0, 1))
    # Neither a NaN, nor a negative scale (signs would flip), nor one that is no power of two holds a value.
    bad = (scales >= 0x7F) | ((three < 0) & (masks != 0))
    lo, hi = np.maximum(low.max(axis=1), -bias), np.minimum(high.min(axis=1), NONE - 1 - bias)
    lost = bad.any(axis=1) | (lo > hi)
    k = _choose(lo, hi, masks, three, power, told[odd].astype(np.int64) - bias, bias)
    if known is not None:
        at = np.searchsorted(odd, known[0])
        k[at] = known[1].astype(np.int64) - bias
        lost |= (k < lo) | (k > hi)
    a = np.where(masks != 0, k[:, None] - power, 0)
    raw = unpack(halves)
    steps = np.clip(a - _SHIFTS.start, 0, len(_SHIFTS) - 1)
    turned = _CODES[three.clip(0)[..., None], steps[..., None], raw & 7]
    new = pack(np.where(turned == NONE, raw, turned | (raw & 8)).astype(np.uint8))
    out = codes.copy()
    out[odd] = new.reshape(-1, MX_BLOCK_BYTES)
    exponents[odd] = (k + bias).astype(np.uint8)
    changed = (new != codes[odd].reshape(new.shape)).any(axis=-1) & ~lost[:, None]
    return TurnedBack(out, exponents, int(changed.sum()), odd[lost])


def _parts(scales: Bytes, masks: Bytes, tensor_scale: float) -> tuple[Ints, Ints]:
    """(whether the odd part of s * S is 3, or -1 for another one; its power of two) of half-blocks [n, 2]."""
    fraction, exponent = np.frexp(np.where(masks != 0, E4M3.values[scales], 1.0) * tensor_scale)
    three = np.where(fraction == 0.5, 0, np.where(fraction == 0.75, 1, -1))
    power = np.where(masks != 0, exponent - 1 - (three == 1), 0)
    return three.astype(np.int64), power.astype(np.int64)


def _choose(lo: Ints, hi: Ints, masks: Bytes, three: Ints, power: Ints, told: Ints, bias: int) -> Ints:
    """An exponent [n] within [lo, hi] for each block: one that keeps the codes of a half if there is one, else lo."""
    k = np.where(hi - lo > _FAR // 2, hi, lo)
    for half in (0, 1):
        keeps = (masks[:, half] != 0) & (three[:, half] == 0) & (lo <= power[:, half]) & (power[:, half] <= hi)
        k = np.where(keeps, power[:, half], k)
    zeros = (masks == 0).all(axis=1)
    byte = np.where(told[:, 0] + bias != NONE, told[:, 0], np.where(told[:, 1] + bias != NONE, told[:, 1], -bias))
    return np.where(zeros, byte, k)
