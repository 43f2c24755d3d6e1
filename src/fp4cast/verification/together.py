"""Compare small tensors together: neighbours in one read, and all bytes of many tensors in one comparison.

A tensor of a few kilobytes costs calls, not bytes. What is not as expected is left to the comparison of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fp4cast.checkpoints.byte_ranges import BUFFERS, Files
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.neighbours import Range, read_ranges
from fp4cast.formats import MX_BLOCK_BYTES, Bytes
from fp4cast.parallel.progress import Advance, ignore
from fp4cast.verification.fast_path import Converted
from fp4cast.verification.values import Comparison, ScaleTables, equal, plain

SMALL_BLOCKS = 1 << 11  # of a tensor that is compared with others: 32 kB of codes
MOST_BLOCKS, MOST = 1 << 15, 256  # of tensors that are compared together, and tensors


def is_small(converted: Converted) -> bool:
    """Whether a tensor can be compared together with others."""
    return not converted.form.transposed and not converted.rounded and converted.pair.blocks <= SMALL_BLOCKS


def compare_together(
    group: Sequence[Converted], tensor_scales: Sequence[float], files: Files, progress: Advance = ignore
) -> list[Comparison | None]:
    """Compare every value of some small tensors.

    Args:
        group: both sides of each; all `is_small`.
        tensor_scales: the destination's, as multipliers.
        files: both sides' files.
        progress: called with the number of bytes just compared.

    Returns:
        A comparison for each; None where its bytes are not as expected, so that it must be compared on its own.
    """
    sizes = np.array([converted.pair.blocks for converted in group])
    ends = np.cumsum(sizes)
    n, starts = int(ends[-1]), ends - sizes
    source_codes, exponents = BUFFERS.source(n, MX_BLOCK_BYTES), BUFFERS.exponents(n)
    codes, scales = BUFFERS.codes(n, MX_BLOCK_BYTES), BUFFERS.scales(n, 2)
    begins = starts.tolist()
    _read(files, [(each.pair.codes, each.pair.scales) for each in group], begins, source_codes, exponents)
    _read(files, [(each.codes, each.scales) for each in group], begins, codes, scales)
    expected = _expected(group, tensor_scales, sizes, exponents)
    used = (np.bitwise_or.reduceat(source_codes.reshape(-1), MX_BLOCK_BYTES * starts) & 0x77) != 0
    bad = np.zeros(len(group), np.bool_)
    if not (plain(scales) and equal(source_codes, codes) and np.array_equal(expected, scales)):
        other = (source_codes != codes).any(axis=1) | (expected != scales).any(axis=1)
        bad = np.logical_or.reduceat(other, starts) | ~_plain_each(scales, starts)
    found = [
        None if wrong else Comparison(verbatim=2 * size, zeros=not value)
        for wrong, size, value in zip(bad.tolist(), sizes.tolist(), used.tolist(), strict=True)
    ]
    progress(int(sizes[~bad].sum()) * (2 * MX_BLOCK_BYTES + 3))  # codes of both sides, an exponent and two scales
    return found


def _read(files: Files, tensors: list[tuple[Tensor, Tensor]], begins: list[int], codes: Bytes, scales: Bytes) -> None:
    """Fill the arrays of codes and of scales, which begin at these blocks, from the files of one side."""
    into_codes, into_scales = codes.data.cast("B"), scales.data.cast("B")
    width = scales.nbytes // len(codes)
    ranges: list[Range] = []
    for (a, b), block in zip(tensors, begins, strict=True):
        at, scale_at = block * MX_BLOCK_BYTES, block * width
        ranges.append((a.path, a.start, into_codes[at : at + a.nbytes]))
        ranges.append((b.path, b.start, into_scales[scale_at : scale_at + b.nbytes]))
    read_ranges(files, ranges)


def _expected(group: Sequence[Converted], tensor_scales: Sequence[float], sizes: np.ndarray, exponents: Bytes) -> Bytes:
    """The E4M3 bytes of both half-blocks of every block, uint8 [n, 2]."""
    number: dict[tuple[float, int], int] = {}
    keys = zip(tensor_scales, (converted.pair.bias for converted in group), strict=True)
    which = [number.setdefault(key, len(number)) for key in keys]
    tables = [ScaleTables.of(*key) for key in number]
    if len(tables) == 1:
        return tables[0].expected(exponents)
    same = np.stack([table.same for table in tables])
    return np.repeat(same[np.repeat(which, sizes), exponents], 2).reshape(-1, 2)


def _plain_each(scales: Bytes, starts: np.ndarray) -> np.ndarray:
    """`plain` of each tensor: bool [tensors]."""
    flat = scales.reshape(-1)
    low, high = np.minimum.reduceat(flat, 2 * starts), np.maximum.reduceat(flat, 2 * starts)
    return np.array([plain(ends) for ends in np.stack([low, high], axis=1)], np.bool_)
