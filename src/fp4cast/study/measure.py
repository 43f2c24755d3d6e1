"""Errors of an NVFP4 tensor, measured exactly on what would be written: it knows the formats and nothing else.

The error of an element depends on its E8M0 byte, its code, the E4M3 byte, the code written, and S, which is one for
all. Equal elements are counted first, and the squares are added as integers. So errors of two algorithms
compare without rounding: a tie is a tie.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fp4cast.formats import E2M1, E4M3, E8M0_BIAS, unpack
from fp4cast.study.tensors import Mxfp4, Nvfp4

_CHUNK = 1 << 18  # blocks counted together: 8 million elements
_BINS = 1 << 23  # 8 bits of E8M0, 4 of the code, 7 of E4M3 without its sign, 4 of the code written


@dataclass(frozen=True)
class Errors:
    """How far an NVFP4 tensor is from its MXFP4 source.

    Attributes:
        squared: sum of squared errors, exact.
        largest: largest absolute error of an element, exact.
        energy: sum of the squares of the source's values, exact.
        elements: how many there are.
    """

    squared: Fraction
    largest: Fraction
    energy: Fraction
    elements: int

    @property
    def exact(self) -> bool:
        """Whether every value equals the source's."""
        return self.largest == 0

    @property
    def mse(self) -> float:
        """Mean squared error."""
        return float(self.squared / self.elements)

    @property
    def snr_db(self) -> float | None:
        """Signal to noise in dB; None where nothing is lost."""
        if self.exact:
            return None
        ratio = self.energy / self.squared
        return 10 * (math.log10(ratio.numerator) - math.log10(ratio.denominator))


def _count(source: Mxfp4, written: Nvfp4) -> dict[int, int]:
    """How often each (E8M0 byte, code, E4M3 byte, code written) occurs, by those bytes as one number."""
    total: Counter[int] = Counter()
    for start in range(0, len(source.exponents), _CHUNK):
        part = slice(start, start + _CHUNK)
        key = source.exponents[part].astype(np.uint32)[:, None] << 4 | unpack(source.codes[part])
        scales = written.block_scales[part].astype(np.uint32)
        key = (key << 11 | np.repeat(scales, 16, axis=1) << 4 | unpack(written.codes[part])).reshape(-1)
        if key.size < _BINS:
            found, counts = np.unique(key, return_counts=True)
        else:
            every = np.bincount(key, minlength=_BINS)
            found = np.flatnonzero(every)
            counts = every[found]
        total.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    return total


def measure(source: Mxfp4, written: Nvfp4) -> Errors:
    """Compare every value of an NVFP4 tensor with its source.

    Raises:
        ValueError: a block scale that is NaN or negative, which no algorithm may write.
    """
    if (written.block_scales >= 0x7F).any():
        raise ValueError("a block scale is NaN or negative")
    counts = _count(source, written)
    squared = largest = energy = Fraction(0)
    scale = Fraction(written.tensor_scale)
    for key, count in counts.items():
        b, code, block_scale, code_written = key >> 15, key >> 11 & 15, key >> 4 & 127, key & 15
        value = Fraction(E2M1.values[code]) * Fraction(2) ** (b - E8M0_BIAS)
        error = abs(value - Fraction(E2M1.values[code_written]) * Fraction(E4M3.values[block_scale]) * scale)
        squared += count * error**2
        energy += count * value**2
        largest = max(largest, error)
    return Errors(squared, largest, energy, sum(counts.values()))
