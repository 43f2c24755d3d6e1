"""Weights quantized to FP8 in blocks of 128 x 128: not exact, and no part of the cast.

The bytes are those of NVIDIA's script for Kimi-K3, which calls nvidia-modelopt's `FP8QTensor.quantize` on the CPU; that
computes in the dtype of the weights. A block's scale is its largest magnitude over 448, rounded to BF16; a code is the
E4M3 number nearest to weight over scale, which is rounded to BF16 before (ties to even, both times).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.header import Tensor
from fp4cast.errors import CheckpointError
from fp4cast.formats import E4M3, E4M3_MAX, Bytes, usable_scale
from fp4cast.layouts.fp8 import BLOCK
from fp4cast.parallel.ranges import spans

Bits = npt.NDArray[np.uint16]  # of BF16
Float32s = npt.NDArray[np.float32]
_INFINITY = 0x7F80
_COLUMNS = 16 * BLOCK  # of a stripe that are computed together


@dataclass(frozen=True, slots=True)
class Fp8Of:
    """The codes or the scales that a BF16 weight becomes, in stripes of 128 rows.

    Attributes:
        module: its name.
        weight: the source's, BF16 [N, K].
        scales: the scales; otherwise the codes.
    """

    module: str
    weight: Tensor
    scales: bool

    @property
    def stripes(self) -> int:
        """How many stripes it has; the last one may be lower."""
        return -(-self.weight.shape[0] // BLOCK)

    @property
    def stripe_bytes(self) -> int:
        """Bytes that a whole stripe becomes."""
        columns = self.weight.shape[1]
        return 4 * -(-columns // BLOCK) if self.scales else BLOCK * columns

    def read(self, stripe: int, files: Files) -> Bits:
        """The weights of a stripe: BF16 [n, K].

        Raises:
            CheckpointError: one is no finite number.
        """
        rows, columns = self.weight.shape
        first, last = stripe * BLOCK, min((stripe + 1) * BLOCK, rows)
        start, nbytes = self.weight.start + 2 * first * columns, 2 * (last - first) * columns
        bits = files[self.weight.path].read(start, nbytes).view("<u2").reshape(-1, columns)
        if ((bits & 0x7FFF) >= _INFINITY).any():
            raise CheckpointError(
                f"{self.weight.path}: {self.weight}: holds infinity or NaN in the rows from {first} on, expected "
                "numbers that can be quantized; leave out --fp8 to copy it as it is"
            )
        return np.asarray(bits, np.uint16)


def to_bf16(values: Float32s) -> Bits:
    """The nearest BF16 of finite numbers, ties to even, as bits."""
    bits = values.view(np.uint32)
    return np.asarray((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16, np.uint16)


def from_bf16(bits: Bits) -> Float32s:
    """The numbers that bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp8_scales(weights: Bits) -> Float32s:
    """The scales of a stripe: BF16 [n, K] with n <= 128 -> FP32 [K / 128, rounded up].

    A block whose scale no GPU could use, as that of zeros, has the scale 1.
    """
    starts = np.arange(0, weights.shape[1], BLOCK)
    largest = np.maximum.reduceat((weights & 0x7FFF).max(axis=0), starts)
    scales = from_bf16(to_bf16(from_bf16(np.asarray(largest, np.uint16)) / np.float32(E4M3_MAX)))
    return np.where([usable_scale(float(scale)) for scale in scales], scales, np.float32(1))


def fp8_codes(weights: Bits, scales: Float32s) -> Bytes:
    """The E4M3 codes of a stripe: BF16 [n, K] and its scales -> uint8 [n, K]."""
    wide, codes = _spread(scales, weights.shape[1]), np.empty(weights.shape, np.uint8)
    for first, last in spans(0, weights.shape[1], _COLUMNS):
        divided = from_bf16(weights[:, first:last]) / wide[first:last]
        codes[:, first:last] = _table()[to_bf16(divided)]
    return codes


def fp8_noise(weights: Bits, codes: Bytes, scales: Float32s) -> tuple[float, float, float]:
    """(squared error, largest error, energy of the weights) of a stripe."""
    wide, squared, largest, energy = _spread(scales, weights.shape[1]), 0.0, 0.0, 0.0
    for first, last in spans(0, weights.shape[1], _COLUMNS):
        values = from_bf16(weights[:, first:last]).astype(np.float64)
        error = np.abs(E4M3.values[codes[:, first:last]] * wide[first:last] - values)
        squared += float((error**2).sum())
        largest, energy = max(largest, float(error.max())), energy + float((values**2).sum())
    return squared, largest, energy


def _spread(scales: Float32s, columns: int) -> Float32s:
    return np.repeat(scales, BLOCK)[:columns]


@cache
def _table() -> Bytes:
    """For all BF16 bits, the code of the nearest E4M3 number, ties to even; 448 where they are larger."""
    grid = E4M3.values[:0x7F]
    numbers = from_bf16(np.arange(_INFINITY, dtype=np.uint16)).astype(np.float64)
    between = (grid[:-1] + grid[1:]) / 2
    up, down = np.searchsorted(between, numbers, "right"), np.searchsorted(between, numbers, "left")
    positive = np.where(up % 2 == 0, up, down).astype(np.uint8)
    table = np.full(1 << 16, 0x7F, np.uint8)
    table[:_INFINITY], table[0x8000 : 0x8000 + _INFINITY] = positive, positive | 0x80
    return table
