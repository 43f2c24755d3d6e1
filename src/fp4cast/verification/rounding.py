"""Is a rounded half-block near its source? No source value pins it down, but its least error can be computed.

Under a tensor scale, the nearest codes under the best of the 126 positive E4M3 scales have the least squared error, and
conversion promises it. All of them are tried here: a receipt that calls other values rounded is not believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fp4cast.formats import E2M1, E4M3, Bytes, Float64s, unpack

Ints = npt.NDArray[np.int64]

_MAGNITUDES = E2M1.values[:8]
_FIRST, _LAST = 0x01, 0x7E  # the positive finite E4M3 codes
_SCALES = E4M3.values[_FIRST : _LAST + 1]
_BATCH = 1 << 12  # half-blocks weighed together: 4 MB of float64
# Far above what float64 loses in these sums, and below the gain of any other code or scale.
_SLACK, _SLACK_OF_ENERGY = 1e-12, 1e-13


class Far(NamedTuple):
    """A half-block that could lie nearer: its index among those judged, its squared error, and the least."""

    at: int
    squared_error: float
    least: float


@dataclass
class Nearness:
    """The half-blocks of a tensor that could lie nearer to the source.

    Attributes:
        far: their number.
        where: (block, half, squared error, the least possible) of the first.
    """

    far: int = 0
    where: tuple[int, int, float, float] | None = None

    def merge(self, other: Nearness) -> None:
        """Add the figures of later blocks of the same tensor."""
        self.far += other.far
        self.where = self.where or other.where


@lru_cache(maxsize=1024)
def _least_errors(unit: float) -> Float64s:
    """The least squared error of each magnitude under each scale: float64 [126, 8].

    Args:
        unit: tensor scale / 2^k, so that the source's values are magnitudes.
    """
    written = (_SCALES * unit)[:, None, None] * _MAGNITUDES
    return np.asarray(((_MAGNITUDES[:, None] - written) ** 2).min(axis=-1), np.float64)


def find_far(source_codes: Bytes, k: Ints, codes: Bytes, scales: Bytes, tensor_scale: float) -> list[Far]:
    """The half-blocks that could lie nearer to the source.

    Args:
        source_codes: packed uint8 [n, 8].
        k: exponents of the source's blocks, int [n].
        codes: as written, packed uint8 [n, 8].
        scales: as written, E4M3 uint8 [n].
        tensor_scale: the multiplier of the whole tensor.
    """
    found: list[Far] = []
    for level in np.unique(k):
        members = np.flatnonzero(k == level)
        unit = tensor_scale / 2.0 ** float(level)
        for first in range(0, len(members), _BATCH):
            batch = members[first : first + _BATCH]
            wrong, error, least = _judge(unpack(source_codes[batch]), unpack(codes[batch]), scales[batch], unit)
            back = 4.0 ** float(level)
            found += [Far(int(batch[i]), float(error[i]) * back, float(least[i]) * back) for i in np.flatnonzero(wrong)]
    return sorted(found)


def _judge(source: Bytes, written: Bytes, scales: Bytes, unit: float) -> tuple[np.ndarray, Float64s, Float64s]:
    """(whether it is far, squared error, least squared error) of half-blocks of one exponent: codes uint8 [n, 16]."""
    errors, magnitudes = _least_errors(unit), source & 7
    counts = np.stack([(magnitudes == magnitude).sum(axis=1) for magnitude in range(8)], axis=1).astype(np.float64)
    least = (counts @ errors.T).min(axis=1)
    known = (scales >= _FIRST) & (scales <= _LAST)
    rows = np.where(known, scales, _FIRST) - _FIRST
    energies = _MAGNITUDES[magnitudes] ** 2
    each = (E2M1.values[source] - (E4M3.values[scales] * unit)[:, None] * E2M1.values[written]) ** 2
    nearest = np.take_along_axis(errors[rows], magnitudes.astype(np.intp), axis=1)
    wrong = (each > nearest * (1 + _SLACK) + _SLACK_OF_ENERGY * energies).any(axis=1)
    wrong |= ((source ^ written) & 8).any(axis=1) | ~known
    total = each.sum(axis=1)
    wrong |= total > least * (1 + _SLACK) + _SLACK_OF_ENERGY * energies.sum(axis=1)
    return wrong, total, least
