"""Brute-force truths with fractions, written from the standards and from nothing in `src`."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import numpy as np

MAGNITUDES = [
    Fraction(0),
    Fraction(1, 2),
    Fraction(1),
    Fraction(3, 2),
    Fraction(2),
    Fraction(3),
    Fraction(4),
    Fraction(6),
]


def power(e: int) -> Fraction:
    return Fraction(2) ** e


@lru_cache
def e4m3(code: int) -> Fraction:
    exponent, mantissa = code >> 3, code & 7
    return Fraction(mantissa, 8) * power(-6) if exponent == 0 else (1 + Fraction(mantissa, 8)) * power(exponent - 7)


POSITIVE_E4M3 = [e4m3(code) for code in range(1, 0x7F)]


def e2m1(code: int) -> Fraction:
    return -MAGNITUDES[code & 7] if code & 8 else MAGNITUDES[code & 7]


def nibbles(packed: np.ndarray) -> list[int]:
    return [nibble for byte in packed.reshape(-1).tolist() for nibble in (byte & 15, byte >> 4)]


def mxfp4(codes: np.ndarray, scales: np.ndarray, bias: int = 127) -> list[tuple[Fraction, bool]]:
    """(value, sign bit) of every element of packed [n, 16] under E8M0 [n]."""
    out = []
    for block, b in zip(codes.reshape(-1, 16), scales.reshape(-1).tolist(), strict=True):
        out += [(e2m1(c) * power(b - bias), bool(c & 8)) for c in nibbles(block)]
    return out


def nvfp4(codes: np.ndarray, scales: np.ndarray, tensor_scale: float) -> list[tuple[Fraction, bool]]:
    """(value, sign bit) of every element of packed [n, 8] under E4M3 [n]."""
    out = []
    for half, s in zip(codes.reshape(-1, 8), scales.reshape(-1).tolist(), strict=True):
        assert 0 <= s < 0x7F
        out += [(e2m1(c) * e4m3(s) * Fraction(tensor_scale), bool(c & 8)) for c in nibbles(half)]
    return out


def representable(members: frozenset[int], k: int, tensor_scale: Fraction) -> bool:
    """Whether some E4M3 scale represents every magnitude code of the set times 2^k."""
    for scale in POSITIVE_E4M3:
        if all(MAGNITUDES[c] * power(k) / (scale * tensor_scale) in MAGNITUDES for c in members):
            return True
    return False


def round_e2m1(x: Fraction) -> Fraction:
    """Nearest magnitude, ties to the even code."""
    best = min(range(8), key=lambda c: (abs(MAGNITUDES[c] - x), c % 2))
    return MAGNITUDES[best]


def best_half_block_error(magnitudes: list[int], k: int, tensor_scale: Fraction) -> Fraction:
    """Least squared error over all 126 scales and nearest codes."""
    values = [MAGNITUDES[c] * power(k) for c in magnitudes]
    return min(
        sum(((v - scale * tensor_scale * round_e2m1(v / (scale * tensor_scale))) ** 2 for v in values), Fraction(0))
        for scale in POSITIVE_E4M3
    )
