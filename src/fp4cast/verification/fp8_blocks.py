"""Weights in FP8, against what quantizing the source's gives: every code, every scale, and how much was lost.

The formula stands here a second time, in other words than in the quantizer: in float64, where each quotient of two BF16
numbers rounds to BF16 as the exact one does, and by rounding significands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.header import Tensor
from fp4cast.formats import E4M3, E4M3_MAX, Float64s, float_values
from fp4cast.layouts.fp8 import BLOCK
from fp4cast.parallel.progress import Advance
from fp4cast.parallel.ranges import spans
from fp4cast.verification.figures import signal_to_noise
from fp4cast.verification.report import Difference

LEAST_SNR = 25.0  # dB, of other tools' weights, which need not be the nearest
_COLUMNS = 16 * BLOCK  # of a stripe that are decoded together
_SMALLEST = float(np.finfo(np.float32).tiny)  # of the scales that a GPU does not flush to zero


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight on both sides.

    Attributes:
        module: its name.
        source: BF16 [N, K].
        codes: E4M3 [N, K].
        scales: FP32 [N / 128, 1, K / 128, 1], rounded up.
    """

    module: str
    source: Tensor
    codes: Tensor
    scales: Tensor

    @property
    def stripes(self) -> int:
        """Stripes of 128 rows; the last one may be lower."""
        return self.scales.shape[0]

    @property
    def stripe_bytes(self) -> int:
        """Bytes of a whole stripe of the source."""
        return 2 * BLOCK * self.source.shape[1]


@dataclass
class Fp8Comparison:
    """The figures measured on one weight.

    Attributes:
        codes: how many are others than the source's weights give.
        scales: how many are.
        where: (row, column, the code's value, the one expected) of the first code that is another.
        squared_error: sum over all weights.
        energy: sum of the squares of the source's weights.
    """

    codes: int = 0
    scales: int = 0
    where: tuple[int, int, float, float] | None = None
    squared_error: float = 0.0
    energy: float = 0.0

    def merge(self, other: Fp8Comparison) -> None:
        """Add later stripes of the same weight."""
        self.codes += other.codes
        self.scales += other.scales
        self.where = self.where or other.where
        self.squared_error += other.squared_error
        self.energy += other.energy

    @property
    def snr_db(self) -> float:
        """Of the weight, in dB."""
        return signal_to_noise(self.energy, self.squared_error)


def compare_stripes(weight: Fp8Weight, first: int, last: int, files: Files, progress: Advance) -> Fp8Comparison:
    """Compare some stripes of a weight."""
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities, which are wrong, too
        return _compare_stripes(weight, first, last, files, progress)


def _compare_stripes(weight: Fp8Weight, first: int, last: int, files: Files, progress: Advance) -> Fp8Comparison:
    found, (rows, columns) = Fp8Comparison(), weight.source.shape
    for stripe in range(first, last):
        top, bottom = stripe * BLOCK, min((stripe + 1) * BLOCK, rows)
        bits = _read(weight.source, top, bottom, files).view("<u2").reshape(-1, columns)
        codes = _read(weight.codes, top, bottom, files).reshape(-1, columns)
        scales = _read(weight.scales, stripe, stripe + 1, files).view("<f4").astype(np.float64)
        for left, right in spans(0, columns, _COLUMNS):
            part = np.ascontiguousarray(bits[:, left:right])
            values = float_values(part.view(np.uint8).reshape(-1), "BF16").reshape(part.shape)
            stored = scales[left // BLOCK : -(-right // BLOCK)]
            _compare(values, E4M3.values[codes[:, left:right]], stored, (top, left), found)
        progress(3 * bits.size + scales.nbytes // 2)
    return found


def _read(tensor: Tensor, first: int, last: int, files: Files) -> np.ndarray:
    size = tensor.nbytes // tensor.shape[0]
    return files[tensor.path].read(tensor.start + first * size, (last - first) * size)


def _compare(values: Float64s, codes: Float64s, stored: Float64s, at: tuple[int, int], found: Fp8Comparison) -> None:
    """Compare some blocks of a stripe.

    Args:
        values: of the source, [n, K].
        codes: the values of the destination's codes, [n, K].
        stored: the scales of the destination's blocks, [K / 128, rounded up].
        at: the row and column where they begin.
        found: what is added to.
    """
    wanted = expected_scales(values)
    found.scales += int((stored != wanted).sum())
    scales, wanted = (np.repeat(each, BLOCK)[: values.shape[1]] for each in (stored, wanted))
    expected = expected_codes(values, wanted)
    wrong = ~((codes == expected) & (np.signbit(codes) == np.signbit(expected)))
    if wrong.any() and found.where is None:
        row, column = (int(each[0]) for each in np.nonzero(wrong))
        found.where = (at[0] + row, at[1] + column, float(codes[row, column]), float(expected[row, column]))
    found.codes += int(wrong.sum())
    found.squared_error += float(((codes * scales - values) ** 2).sum())
    found.energy += float((values**2).sum())


def expected_scales(values: Float64s) -> Float64s:
    """The scales of a stripe of weights [n, K] with n <= 128: float64 [K / 128, rounded up]."""
    blocks = [np.abs(values[:, at : at + BLOCK]).max() for at in range(0, values.shape[1], BLOCK)]
    scales = _to_bf16(np.array(blocks) / E4M3_MAX)
    scales[~(scales >= _SMALLEST)] = 1.0
    return scales


def expected_codes(values: Float64s, scales: Float64s) -> Float64s:
    """The values of the codes of weights [n, K] under the scales of their columns [K]."""
    divided = _to_bf16(values / scales)
    exponents = np.maximum(np.frexp(divided)[1] - 1, -6)  # below 2^-6 E4M3 is subnormal
    steps = np.ldexp(1.0, exponents - 3)
    return np.asarray(np.clip(np.rint(divided / steps) * steps, -E4M3_MAX, E4M3_MAX))


def _to_bf16(values: Float64s) -> Float64s:
    """The nearest numbers of eight significant bits, ties to even."""
    significands, exponents = np.frexp(values)
    return np.asarray(np.ldexp(np.rint(significands * 256), exponents - 8))


def fp8_differences(weight: Fp8Weight, found: Fp8Comparison, maker: str = "") -> Iterator[Difference]:
    """What is wrong with a weight; another tool than fp4cast may have rounded otherwise, if nothing is far away."""
    if maker and found.snr_db >= LEAST_SNR:
        return
    if found.scales:
        detail = f"{found.scales} scales are others than the source's largest magnitudes over 448, in BF16, give"
        yield Difference(weight.scales.name, "scale", detail)
    if found.codes:
        row, column, actual, expected = found.where or (0, 0, float("nan"), float("nan"))
        detail = (
            f"{found.codes} codes are others than the source's weights give; the first is row {row}, column {column}: "
            f"expected {expected!r}, got {actual!r}"
        )
        yield Difference(weight.codes.name, "values", detail)
