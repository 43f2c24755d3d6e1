"""The algorithms: each turns one MXFP4 tensor, one scale domain, into the NVFP4 tensor that it would write.

1 to 3 are those of NVIDIA Model-Optimizer's experiment (pull request 1364); 4 is fp4cast's. What 1 to 3 do to a value
depends on three small numbers only: its block's exponent, the largest magnitude of its half-block, and its code. So a
tensor is requantized by looking codes up, and a sweep over m weighs a histogram instead of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import numpy as np

from fp4cast.casting.nearest import choose_nearest, encode
from fp4cast.casting.tight_rule import (
    E_MAX,
    E_MIN,
    WINDOW,
    ArrayBlocks,
    Ints,
    Scaling,
    choose_unscaled,
    halve,
    scale_table,
)
from fp4cast.formats import E2M1, E4M3, E8M0_BIAS, MX_BLOCK, TENSOR_TOP, Bytes, pack, unpack
from fp4cast.study.tensors import Mxfp4, Nvfp4, magnitudes, nearest

_MAGNITUDES = E2M1.values[:8]
_SCALES = E4M3.values[:0x7F]  # the non-negative finite ones
_SMALLEST = 0x01  # code of 2^-9, to which block scales are clamped
_TWICE = [int(2 * value) for value in _MAGNITUDES]


def _standard(b: int, tensor_scale: float, flush: bool = False) -> tuple[Bytes, Bytes]:
    """Standard NVFP4 of half-blocks under an E8M0 byte: s = E4M3(amax / (6 S)) in FP32, codes to nearest, ties to even.

    Args:
        b: the E8M0 byte.
        tensor_scale: S.
        flush: let a scale of 2^-10 and less become 0, and all its codes, as the original did, instead of 2^-9.

    Returns:
        By the half-block's largest magnitude code: E4M3 codes uint8 [8], and magnitude codes uint8 [8, 8] by code.
    """
    values = _MAGNITUDES * 2.0 ** (b - E8M0_BIAS)
    with np.errstate(over="ignore"):  # 4 * 2^127 and 6 * 2^126 are infinite in FP32, and no tensor here has them
        wanted = values.astype(np.float32) / (np.float32(6) * np.float32(tensor_scale))
    scales = nearest(_SCALES, wanted)
    if not flush:
        scales = np.maximum(scales, np.uint8(_SMALLEST))
    # Midpoints are multiplied, not values divided: products are exact, and a quotient could hide a tie.
    codes = np.stack([nearest(_MAGNITUDES * (_SCALES[s] * tensor_scale), values) for s in scales])
    codes[scales == 0] = 0
    return scales, codes


def _requantized(source: Mxfp4, blocks: Ints, tensor_scale: float, flush: bool) -> tuple[Bytes, Bytes]:
    """Standard NVFP4 of some blocks: (packed codes uint8 [n, 16], E4M3 codes uint8 [n, 2])."""
    codes, scales = np.empty((len(blocks), 16), np.uint8), np.empty((len(blocks), 2), np.uint8)
    exponents = source.exponents[blocks]
    for b in np.unique(exponents):
        rows = np.flatnonzero(exponents == b)
        by_largest, table = _standard(int(b), tensor_scale, flush)
        largest = source.half_largest[blocks[rows]]
        raw = unpack(source.codes[blocks[rows]]).reshape(len(rows), 2, 16)
        codes[rows] = pack((table[largest[:, :, None], raw & 7] | raw & 8).reshape(len(rows), MX_BLOCK))
        scales[rows] = by_largest[largest]
    return codes, scales


def requantize(source: Mxfp4, flush: bool = False) -> Nvfp4:
    """Algorithm 1: dequantize to BF16, then standard NVFP4 with S = amax / (6 * 448).

    BF16 holds every value, except from 2^128 on, which it does not have: those raise.

    Raises:
        OverflowError: a value that BF16 and FP32 turn into infinity.
    """
    largest = source.half_largest.max(axis=1)
    amax = float((_MAGNITUDES[largest] * 2.0 ** (source.exponents.astype(np.float64) - E8M0_BIAS)).max(initial=0.0))
    if amax >= 2.0**128:
        raise OverflowError(f"a value of {amax:g} is infinite in BF16")
    scale = float(np.float32(amax) / np.float32(TENSOR_TOP)) or 1.0
    codes, scales = _requantized(source, np.arange(len(source.exponents)), scale, flush)
    return Nvfp4(codes, scales, scale, None)


def verbatim(source: Mxfp4, m: int) -> Nvfp4:
    """Algorithm 2 under a given m: all codes kept, block scales 2^clamp(k - m, -9, 8)."""
    return Nvfp4(source.codes, halve(source.exponents, scale_table(m)).reshape(-1, 2), 2.0**m, m)


def midpoint(source: Mxfp4) -> Nvfp4:
    """Algorithm 2, m in the middle of the exact interval; median(k) + 1, the window's centre, where there is none.

    Halves are rounded up, the median is the lower one, and S stays in FP32.
    """
    if source.spread <= WINDOW:
        return verbatim(source, min(-(-(source.k_max - E_MAX + source.k_min - E_MIN) // 2), 127))
    median = int(np.sort(source.used)[(len(source.used) - 1) // 2]) - E8M0_BIAS
    return verbatim(source, min(median - (E_MAX + E_MIN) // 2, 127))


def _candidates(source: Mxfp4) -> range:
    """Every m that can matter: from where all blocks are above the window to where all are below, 6 * 2^m in FP32."""
    return range(max(source.k_min - E_MAX - 1, -149), min(source.k_max - E_MIN + 1, 125) + 1)


def search(source: Mxfp4) -> Nvfp4:
    """Algorithm 2, m of least sum_j A_j (2^k_j - 2^(m + clamp(k_j - m, -9, 8)))^2 with A_j = sum c^2; least first."""
    levels = np.unique(source.used)
    squares = np.array([value**2 for value in _TWICE])
    weight = {
        int(b) - E8M0_BIAS: int(squares[magnitudes(source.codes[source.exponents == b])].sum(dtype=np.int64))
        for b in levels
    }

    def error(m: int) -> int:  # in integers, so that equal is equal: powers of two from the smallest that is written
        base = source.k_min - 18  # the smallest m is k_min - 9, and the smallest scale 2^(m - 9)
        snapped = {k: m + min(max(k - m, E_MIN), E_MAX) for k in weight}
        return sum(a * ((1 << k - base) - (1 << snapped[k] - base)) ** 2 for k, a in weight.items())

    return verbatim(source, min(_candidates(source), key=error))


def hybrid(source: Mxfp4, m: int, flush: bool = False) -> Nvfp4:
    """Algorithm 3 under a given m: verbatim in the window, standard NVFP4 with S = 2^m outside of it."""
    k = source.exponents.astype(np.int64) - E8M0_BIAS
    outside = np.flatnonzero((k < m + E_MIN) | (k > m + E_MAX))
    kept = verbatim(source, m)
    codes, scales = source.codes.copy() if outside.size else source.codes, kept.block_scales.copy()
    codes[outside], scales[outside] = _requantized(source, outside, 2.0**m, flush)
    return Nvfp4(codes, scales, 2.0**m, m)


def sweep_errors(source: Mxfp4) -> dict[int, Fraction]:
    """Squared error of Algorithm 3 under every candidate m, exactly, from a histogram of (exponent, largest, code)."""
    counts: dict[int, list[tuple[int, int, int]]] = {}
    for b in np.unique(source.used):
        rows = source.exponents == b
        pairs = source.half_largest[rows].repeat(16, axis=1) * np.uint8(8) + magnitudes(source.codes[rows])
        found = np.bincount(pairs.reshape(-1), minlength=64)
        counts[int(b) - E8M0_BIAS] = [(int(i) >> 3, int(i) & 7, int(found[i])) for i in np.flatnonzero(found)]
    errors = {}
    for m in _candidates(source):
        errors[m] = Fraction(0)
        for k, entries in counts.items():
            unit = _unit_errors(k - m)
            errors[m] += sum(count * unit[largest][code] for largest, code, count in entries) * Fraction(4) ** k
    return errors


@lru_cache(maxsize=512)
def _unit_errors(e: int) -> list[list[Fraction]]:
    """Squared errors [8][8], by largest magnitude and code, of half-blocks with k - m = e, in units of 4^k."""
    if E_MIN <= e <= E_MAX:
        return [[Fraction(0)] * 8] * 8
    scales, codes = _standard(E8M0_BIAS, 2.0 ** -min(max(e, -40), 40))  # beyond, all saturate or all are too small
    units = [Fraction(float(_SCALES[s])) / Fraction(2) ** e for s in scales]
    return [
        [
            (Fraction(_TWICE[code], 2) - Fraction(_TWICE[codes[largest, code]], 2) * units[largest]) ** 2
            for code in range(8)
        ]
        for largest in range(8)
    ]


def sweep(source: Mxfp4) -> Nvfp4:
    """Algorithm 3, m of least squared error over every candidate; the smallest of equals."""
    errors = sweep_errors(source)
    return hybrid(source, min(errors, key=lambda m: (errors[m], m)))


def closed_form(source: Mxfp4) -> Nvfp4:
    """Algorithm 3 with m = k_max - 8."""
    return hybrid(source, source.k_max - E_MAX)


def tight(source: Mxfp4) -> Nvfp4:
    """Algorithm 4: the tight rule, then the nearest values where no m is exact."""
    return _encoded(source, choose_nearest([_blocks(source)]))


def unscaled(source: Mxfp4) -> Nvfp4:
    """Algorithm 4 where nothing holds a tensor scale: S = 1, as in GGUF's gpt-oss and MLX's nvfp4."""
    return _encoded(source, choose_unscaled([_blocks(source)])[0])


def _blocks(source: Mxfp4) -> ArrayBlocks:
    return ArrayBlocks("tensor", source.codes, source.exponents)


def _encoded(source: Mxfp4, scaling: Scaling) -> Nvfp4:
    encoded = encode(source.codes, source.exponents, scaling)
    return Nvfp4(encoded.codes, encoded.block_scales, scaling.tensor_scale, scaling.m)


ALGORITHMS: dict[str, Callable[[Mxfp4], Nvfp4]] = {
    "1": requantize,
    "2-midpoint": midpoint,
    "2-search": search,
    "3-sweep": sweep,
    "3": closed_form,
    "4": tight,
}
TITLES = {
    "1": "dequantize, requantize",
    "2-midpoint": "codes verbatim, middle m",
    "2-search": "codes verbatim, best m",
    "3-sweep": "hybrid, best m",
    "3": "hybrid, m = k_max − 8",
    "4": "fp4cast",
}
