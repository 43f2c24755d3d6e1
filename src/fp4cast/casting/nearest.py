"""Write half-blocks under a tensor scale: verbatim, shifted, or, where neither is exact, rounded with least error.

A half-block is rounded to the E4M3 scale (of all 126 positive ones) and the codes of least squared error, so its error
is at most that of any method that uses the same tensor scale. The candidates for S are every integer m in [hi, lo]
(no m outside lowers the error of any half-block: below hi only the largest lose range, above lo only the smallest) and
the continuous S = max|v| / (6 * 448) of the standard recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fp4cast.casting.tight_rule import (
    E_MAX,
    E_MIN,
    BlockSource,
    Ints,
    Scaling,
    choose,
    half_masks,
    halve,
    outside_window,
    scale_table,
    shift_bounds,
    shift_codes,
)
from fp4cast.formats import (
    E2M1,
    E4M3,
    E8M0_BIAS,
    MX_BLOCK_BYTES,
    TENSOR_TOP,
    Bytes,
    Float64s,
    mxfp4_values,
    nvfp4_values,
    pack,
    unpack,
)

_MAGNITUDES = E2M1.values[:8]
_MIDPOINTS = (_MAGNITUDES[:-1] + _MAGNITUDES[1:]) / 2
_FIRST, _LAST = 0x01, 0x7E  # the positive finite E4M3 codes
_SCALES = E4M3.values[_FIRST : _LAST + 1]
_BATCH = 2048  # half-blocks whose 126 candidates are weighed together: 2 MB of float64
_CHUNK = 1 << 11  # blocks weighed between two checks of `stop`
_READ = 1 << 15  # blocks whose codes are read together


@dataclass(frozen=True)
class Encoded:
    """NVFP4 blocks, ready to write, and their errors.

    Attributes:
        codes: packed uint8 [n, 16].
        block_scales: E4M3 uint8 [n, 2].
        shifted: half-blocks whose codes were divided by a power of two; exact.
        rounded: half-blocks that no scale represents.
        squared_error: sum over the rounded half-blocks, measured on the values written.
        max_error: largest absolute error among them.
    """

    codes: Bytes
    block_scales: Bytes
    shifted: int = 0
    rounded: int = 0
    squared_error: float = 0.0
    max_error: float = 0.0


@lru_cache(maxsize=1024)
def _candidates(unit: float) -> tuple[Bytes, Float64s]:
    """Every E4M3 scale's best code and squared error for every magnitude.

    Args:
        unit: S / 2^k, so that values are measured in units of the MXFP4 block's scale.

    Returns:
        Magnitude codes uint8 [126, 8] (nearest, ties to even), squared errors float64 [126, 8].
    """
    ratio = (_SCALES * unit)[:, None]
    codes = np.zeros((len(_SCALES), 8), np.uint8)
    for i, midpoint in enumerate(_MIDPOINTS):
        # Compared as products, which are exact: a quotient could hide a tie.
        beyond = midpoint * ratio <= _MAGNITUDES if i % 2 else midpoint * ratio < _MAGNITUDES
        codes += beyond.astype(np.uint8)
    return codes, (_MAGNITUDES - ratio * _MAGNITUDES[codes]) ** 2


def _best(magnitudes: Bytes, unit: float) -> tuple[Bytes, Ints, Float64s]:
    """Nearest codes uint8 [n, 16], index of the scale int [n] and squared error float64 [n] of half-blocks."""
    codes, errors = _candidates(unit)
    total = np.zeros((len(magnitudes), len(_SCALES)))
    for magnitude in range(1, 8):  # a fixed order of plain sums: the same bytes on every machine
        count = (magnitudes == magnitude).sum(axis=1, dtype=np.float64)
        total += count[:, None] * errors[:, magnitude]
    best = total.argmin(axis=1)
    return np.take_along_axis(codes[best], magnitudes, axis=1), best, total[np.arange(len(best)), best]


def _rounded(codes: Bytes, k: Ints, tensor_scale: float) -> Iterator[tuple[Ints, Bytes, Bytes, float]]:
    """Round half-blocks uint8 [n, 8] with exponents k, those of the largest exponent first.

    Yields:
        Indices int [m], codes uint8 [m, 8], E4M3 codes uint8 [m], sum of the squared errors.
    """
    if not len(k):
        return  # as for every exact cast; `np.unique` would load numpy.ma
    for level in np.unique(k)[::-1]:
        members = np.flatnonzero(k == level)
        for i in range(0, len(members), _BATCH):
            batch = members[i : i + _BATCH]
            raw = unpack(codes[batch])
            nearest, best, error = _best(raw & np.uint8(7), tensor_scale / 2.0**level)
            scales = (best + _FIRST).astype(np.uint8)
            yield batch, pack(nearest | (raw & np.uint8(8))), scales, float(error.sum() * 4.0**level)


def _split(codes: Bytes, k: Ints, m: int | None) -> tuple[Ints, Ints, Ints]:
    """Sort half-blocks uint8 [n, 8]: (indices to shift, their shifts, indices to round); the rest stays verbatim."""
    masks = half_masks(codes)
    nonzero = np.flatnonzero(masks)
    if m is None:
        return np.empty(0, np.int64), np.empty(0, np.int64), nonzero
    e = k[nonzero] - m
    shift = np.clip(e, E_MIN, E_MAX) - e
    a_min, a_max = shift_bounds(masks[nonzero])
    exact = (a_min <= shift) & (shift <= a_max)
    moved = exact & (shift != 0)
    return nonzero[moved], shift[moved], nonzero[~exact]


def encode(codes: Bytes, exponents: Bytes, scaling: Scaling, bias: int = E8M0_BIAS) -> Encoded:
    """Write blocks under a domain's tensor scale.

    Args:
        codes: packed uint8 [n, 16].
        exponents: E8M0 uint8 [n], none of them 255.
        scaling: the domain's, from `choose` or `choose_nearest`.
        bias: exponent bias of the E8M0 bytes.

    Returns:
        The NVFP4 blocks, and what was done to them.
    """
    m = scaling.m
    table = scale_table(m if m is not None else 0, bias)
    block_scales = halve(exponents, table).reshape(-1, 2)
    k = exponents.astype(np.int64) - bias
    outside = scaling.undecided(k)
    if not outside.size:
        return Encoded(codes, block_scales)
    halves, half_k = codes[outside].reshape(-1, 8), np.repeat(k[outside], 2)
    half_scales = block_scales[outside].reshape(-1)
    moved, shifts, lost = _split(halves, half_k, m)
    before = halves[lost]
    halves[moved] = shift_codes(halves[moved], shifts)
    for members, rounded, scales, _ in _rounded(before, half_k[lost], scaling.tensor_scale):
        halves[lost[members]], half_scales[lost[members]] = rounded, scales
    codes = codes.copy()
    codes[outside] = halves.reshape(-1, MX_BLOCK_BYTES)
    block_scales[outside] = half_scales.reshape(-1, 2)
    written = _half_values(halves[lost], E4M3.values[half_scales[lost]] * scaling.tensor_scale)
    difference = np.abs(written - _half_values(before, 2.0 ** half_k[lost].astype(np.float64)))
    return Encoded(
        codes,
        block_scales,
        len(moved),
        len(lost),
        float((difference**2).sum()),
        float(difference.max(initial=0.0)),
    )


def block_scale_bytes(exponents: Bytes, scaling: Scaling, bias: int, read_codes: Callable[[Ints], Bytes]) -> Bytes:
    """The E4M3 block scales of some blocks; codes are read only where exponents do not decide.

    Args:
        exponents: E8M0 uint8 [n], none of them 255.
        scaling: their domain's.
        bias: exponent bias of the E8M0 bytes.
        read_codes: returns packed codes uint8 [m, 16] of the blocks with the given indices; called only for blocks
            outside of the window, in a domain that is not verbatim.

    Returns:
        uint8 [2n], two for each block.
    """
    out = halve(exponents, scale_table(scaling.m if scaling.m is not None else 0, bias))
    outside = scaling.undecided(exponents.astype(np.int64) - bias)
    for first in range(0, len(outside), _READ):
        odd = outside[first : first + _READ]
        out.reshape(-1, 2)[odd] = encode(read_codes(odd), exponents[odd], scaling, bias).block_scales
    return out


def _half_values(codes: Bytes, scales: Float64s) -> Float64s:
    return np.asarray(E2M1.values[unpack(codes)] * scales[:, None], np.float64)


def _chunks(domain: Sequence[BlockSource]) -> Iterator[tuple[BlockSource, Ints, Ints]]:
    """(source, block indices, exponents k) over a whole domain, in a fixed order and size."""
    for source in domain:
        for start, chunk in source.exponents():
            for i in range(0, len(chunk), _CHUNK):
                part = chunk[i : i + _CHUNK]
                yield source, np.arange(start + i, start + i + len(part)), part.astype(np.int64) - source.bias


def squared_error(domain: Sequence[BlockSource], tensor_scale: float, m: int | None, stop: float) -> float:
    """Total squared error of a domain under a tensor scale, or infinity as soon as it exceeds `stop`."""
    total = 0.0
    for source, blocks, k in _chunks(domain):
        outside = outside_window(k, m)
        if not outside.size:
            continue
        halves, half_k = source.codes(blocks[outside]).reshape(-1, 8), np.repeat(k[outside], 2)
        _, _, lost = _split(halves, half_k, m)
        for *_, error in _rounded(halves[lost], half_k[lost], tensor_scale):
            total += error
            if total > stop:
                return float("inf")
    return total


def _largest_value(domain: Sequence[BlockSource], k_max: int) -> float:
    """max|v| of a domain. Only blocks within 3 binades of the top can hold it: magnitudes span 0.5 to 6."""
    largest = 0.0
    for source, blocks, k in _chunks(domain):
        near = np.flatnonzero((k >= k_max - 3) & (k <= k_max))
        if near.size:
            magnitudes = E2M1.values[unpack(source.codes(blocks[near])) & 7].max(axis=1)
            largest = max(largest, float((magnitudes * 2.0 ** k[near].astype(np.float64)).max()))
    return largest


def choose_nearest(domain: Sequence[BlockSource]) -> Scaling:
    """The tensor scale of least total squared error; the exact one if it exists."""
    scaling, _ = choose(domain)
    if scaling.exact or scaling.k_max is None:
        return scaling
    best, least = scaling, float("inf")
    # Under lo the largest keep their range; elsewhere their errors outweigh all others and end the sum early.
    for m in range(scaling.lo, scaling.hi - 1, -1):
        error = squared_error(domain, 2.0**m, m, least)
        if error < least:
            best, least = replace(scaling, tensor_scale=2.0**m, m=m, verbatim=False), error
    continuous = float(np.float32(_largest_value(domain, scaling.k_max) / TENSOR_TOP))
    if squared_error(domain, continuous, None, least) < least:
        best = replace(scaling, tensor_scale=continuous, m=None, verbatim=False)
    return best


def before_and_after(
    codes: Bytes, exponents: Bytes, scaling: Scaling, bias: int = E8M0_BIAS
) -> tuple[Float64s, Float64s]:
    """Values float64 [n, 32] of blocks, and those that `encode` writes for them; arguments as there."""
    written = encode(codes, exponents, scaling, bias)
    before = mxfp4_values(codes, exponents[:, None], bias)
    return before, nvfp4_values(written.codes, written.block_scales, scaling.tensor_scale)


@dataclass(frozen=True)
class Cost:
    """What `nearest` does to a domain that no tensor scale keeps exact.

    Attributes:
        blocks: blocks of 32 in the domain.
        rounded: those of which some value changes.
        snr_db: 10 log10(energy / squared error) of the rounded blocks alone.
        max_error: largest absolute error.
    """

    blocks: int
    rounded: int
    snr_db: float
    max_error: float


def cost_of_nearest(domain: Sequence[BlockSource]) -> Cost:
    """Round a domain without writing it; reads the codes of the blocks outside of the window alone."""
    scaling = choose_nearest(domain)
    count = rounded = 0
    energy = error = largest = 0.0
    for source, blocks, k in _chunks(domain):
        count += len(blocks)
        odd = scaling.undecided(k)
        if not odd.size:
            continue
        exponents = (k[odd] + source.bias).astype(np.uint8)
        before, after = before_and_after(source.codes(blocks[odd]), exponents, scaling, source.bias)
        difference = after - before
        changed = (difference != 0).any(axis=1)
        rounded += int(changed.sum())
        energy, error = energy + float((before[changed] ** 2).sum()), error + float((difference**2).sum())
        largest = max(largest, float(np.abs(difference).max()))
    return Cost(count, rounded, 10 * math.log10(energy / error) if error else math.inf, largest)
