"""The study's tensors: one in MXFP4, those in NVFP4 made of it, and the quantization of values to MXFP4."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fp4cast.formats import E2M1, E8M0_BIAS, MX_BLOCK, Bytes, Float64s, pack, unpack

Values = npt.NDArray[np.floating]
_MAGNITUDES = E2M1.values[:8]
_BYTE_LARGEST = np.array([max(b & 7, b >> 4 & 7) for b in range(256)], np.uint8)


@dataclass(frozen=True)
class Mxfp4:
    """An MXFP4 tensor that is one scale domain.

    Attributes:
        codes: packed uint8 [blocks, 16].
        exponents: E8M0 uint8 [blocks], none of them 255.
        shape: of the values, the last axis in blocks; for show.
    """

    codes: Bytes
    exponents: Bytes
    shape: tuple[int, ...] = field(default=())

    @cached_property
    def half_largest(self) -> Bytes:
        """The largest magnitude code of each half-block: uint8 [blocks, 2]."""
        return np.asarray(_BYTE_LARGEST[self.codes].reshape(-1, 2, 8).max(axis=2), np.uint8)

    @cached_property
    def used(self) -> Bytes:
        """The E8M0 bytes of the blocks that hold a non-zero code."""
        return self.exponents[self.half_largest.any(axis=1)]

    @property
    def k_min(self) -> int:
        """Smallest exponent over blocks that hold a non-zero code; 0 where all are zero."""
        return int(self.used.min(initial=255)) - E8M0_BIAS if self.used.size else 0

    @property
    def k_max(self) -> int:
        """Largest exponent over the same blocks."""
        return int(self.used.max(initial=0)) - E8M0_BIAS if self.used.size else 0

    @property
    def spread(self) -> int:
        """Binades between `k_min` and `k_max`."""
        return self.k_max - self.k_min

    def outside(self, m: int) -> int:
        """How many blocks with a non-zero code lie outside of the window of S = 2^m."""
        k = self.used.astype(np.int64) - E8M0_BIAS
        return int(((k < m - 9) | (k > m + 8)).sum())


@dataclass(frozen=True)
class Nvfp4:
    """An NVFP4 tensor, as it would be written.

    Attributes:
        codes: packed uint8 [blocks of 32, 16].
        block_scales: E4M3 uint8 [blocks of 32, 2].
        tensor_scale: S, a float32 value.
        m: log2 of S where the algorithm chose a power of two, else None.
    """

    codes: Bytes
    block_scales: Bytes
    tensor_scale: float
    m: int | None


def nearest(table: Float64s, values: Values) -> Bytes:
    """Index of the entry nearest to each value; ties go to the even index, whose code ends in 0.

    Args:
        table: ascending, at most 256 entries: the values of a format's codes in the order of its codes.
        values: non-negative, of any shape.
    """
    midpoints = (table[:-1] + table[1:]) / 2
    low = np.searchsorted(midpoints, values, side="left")
    tied = np.append(midpoints, np.inf)[low] == values
    return np.asarray(low + (tied & (low % 2 == 1)), np.uint8)


def quantize(values: Values, shape: tuple[int, ...] = ()) -> Mxfp4:
    """Quantize to MXFP4: the smallest power of two under which no code saturates, codes to nearest, ties to even.

    Args:
        values: finite, last axis a multiple of 32.
        shape: what to call the shape, where it is not that of `values`.

    The rule for the scale, 2^ceil(log2(amax / 6)), is ModelOpt's. A block of zeros gets the scale byte 0.
    """
    blocks = np.asarray(values).reshape(-1, MX_BLOCK)
    fraction, exponent = np.frexp(np.abs(blocks).max(axis=1).astype(np.float64))
    # amax <= 6 * 2^k is fraction <= 0.75 * 2^(k + 3 - exponent).
    k = np.where(fraction > 0, np.clip(exponent - 3 + (fraction > 0.75), -E8M0_BIAS, E8M0_BIAS), -E8M0_BIAS)
    scaled = np.ldexp(blocks, -k[:, None])
    codes = nearest(_MAGNITUDES, np.abs(scaled)) | (np.signbit(scaled).astype(np.uint8) << np.uint8(3))
    return Mxfp4(pack(codes), (k + E8M0_BIAS).astype(np.uint8), shape or np.shape(values))


def magnitudes(codes: Bytes) -> Bytes:
    """Magnitude codes of packed bytes: uint8 [..., n] -> uint8 [..., 2n]."""
    return unpack(codes) & np.uint8(7)
