"""Compare one shard of the destination: the work as data, the comparison, and its findings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np

from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.neighbours import read_ranges
from fp4cast.formats import usable_scale
from fp4cast.parallel.ranges import grouped, spans
from fp4cast.parallel.workers import Workers
from fp4cast.verification.fast_path import Converted, compare_bytes, compare_units, count_units, energy_of_units
from fp4cast.verification.fp8_blocks import Fp8Comparison, Fp8Weight, compare_stripes
from fp4cast.verification.together import MOST, MOST_BLOCKS, compare_together, is_small
from fp4cast.verification.values import Comparison


class StoredScales(NamedTuple):
    """The scalars of one weight as stored: S or 1/S."""

    tensor_scale: float
    input_scale: float | None


@dataclass
class ShardWork:
    """Tensors of one shard of the destination that are to be compared.

    Attributes:
        converted: those that were cast.
        copies: (source, destination) of those that were not.
        fp8: those that were quantized to FP8.
    """

    converted: list[Converted] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    fp8: list[Fp8Weight] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of both sides."""
        cast, copied = sum(each.nbytes for each in self.converted), sum(2 * copy.nbytes for _, copy in self.copies)
        return cast + copied + sum(each.source.nbytes + each.codes.nbytes for each in self.fp8)


@dataclass
class ShardFindings:
    """The findings about one shard, in the order of its work.

    Attributes:
        comparisons: one for every cast tensor; None where its tensor scale is not usable.
        scales: one for every cast tensor.
        copies: for every copy, the position of the first byte that differs, or None.
        fp8: one for every weight in FP8.
    """

    comparisons: list[Comparison | None]
    scales: list[StoredScales]
    copies: list[int | None]
    fp8: list[Fp8Comparison] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Units:
    """[first, last) of the item with this number: units of a cast tensor, bytes of a copy, stripes of one in FP8."""

    number: int
    first: int
    last: int


def check_shard(work: ShardWork, pool: Workers) -> ShardFindings:
    """Compare everything in `work`."""
    with Files() as files:
        scales = _scales(work, files)
        pool.advance(sum(4 for stored in scales for scale in stored if scale is not None))
        comparisons = _compare_values(work, scales, files, pool)
        copies = _compare_copies(work, files, pool)
        return ShardFindings(comparisons, scales, copies, _compare_fp8(work, files, pool))


def _scales(work: ShardWork, files: Files) -> list[StoredScales]:
    """The scalars of every cast tensor; a shard has them side by side."""
    tensors = [each.tensor_scale for each in work.converted]
    inputs = [each.input_scale for each in work.converted]
    stored = _scalars(tensors, files)
    others = iter(_scalars([tensor for tensor in inputs if tensor is not None], files))
    return [
        StoredScales(scale, None if tensor is None else next(others))
        for scale, tensor in zip(stored, inputs, strict=True)
    ]


def _scalars(tensors: list[Tensor], files: Files) -> list[float]:
    values = np.empty(len(tensors), "<f4")
    view = values.data.cast("B")
    read_ranges(files, [(each.path, each.start, view[4 * i : 4 * i + 4]) for i, each in enumerate(tensors)])
    found: list[float] = values.tolist()
    return found


def _compare_values(
    work: ShardWork, scales: list[StoredScales], files: Files, pool: Workers
) -> list[Comparison | None]:
    comparisons = [Comparison() if usable_scale(stored.tensor_scale) else None for stored in scales]

    def multiplier(number: int) -> float:
        stored = scales[number].tensor_scale
        return 1.0 / stored if work.converted[number].form.reciprocal else stored

    def alone(units: _Units) -> Comparison:
        number = units.number
        return compare_units(work.converted[number], units.first, units.last, multiplier(number), files, pool.advance)

    def together(group: list[_Units]) -> Iterator[tuple[int, Comparison]]:
        numbers = [units.number for units in group]
        tensors, factors = [work.converted[i] for i in numbers], list(map(multiplier, numbers))
        found = compare_together(tensors, factors, files, pool.advance)
        for units, comparison in zip(group, found, strict=True):
            yield units.number, comparison or alone(units)

    def compare(piece: list[_Units]) -> list[tuple[int, Comparison]]:
        found: list[tuple[int, Comparison]] = []
        with pool.one_at_a_time_if_many(len(piece)):
            for small, run in groupby(piece, lambda units: is_small(work.converted[units.number])):
                if small:
                    sized = ((units, work.converted[units.number].pair.blocks) for units in run)
                    for group in grouped(sized, MOST_BLOCKS, MOST):
                        found += together(group)
                else:
                    found += ((units.number, alone(units)) for units in run)
        return found

    for found in pool.map(compare, grouped(_value_units(work, comparisons), tiles.LIMITS.compare_bytes)):
        for number, comparison in found:
            if (whole := comparisons[number]) is not None:
                whole.merge(comparison)
    for converted, whole in zip(work.converted, comparisons, strict=True):
        if whole is not None and whole.rounded:
            whole.energy = energy_of_units(converted, files, pool.check)
    return comparisons


def _compare_copies(work: ShardWork, files: Files, pool: Workers) -> list[int | None]:
    copies: list[int | None] = [None] * len(work.copies)

    def compare(piece: list[_Units]) -> list[tuple[int, int | None]]:
        with pool.one_at_a_time_if_many(len(piece)):
            return [
                (p.number, compare_bytes(*work.copies[p.number], p.first, p.last - p.first, files, pool.advance))
                for p in piece
            ]

    for found in pool.map(compare, grouped(_copy_units(work), tiles.LIMITS.compare_bytes)):
        for number, at in found:
            if copies[number] is None:
                copies[number] = at
    return copies


def _compare_fp8(work: ShardWork, files: Files, pool: Workers) -> list[Fp8Comparison]:
    comparisons = [Fp8Comparison() for _ in work.fp8]

    def compare(piece: list[_Units]) -> list[tuple[int, Fp8Comparison]]:
        return [(p.number, compare_stripes(work.fp8[p.number], p.first, p.last, files, pool.advance)) for p in piece]

    units = (cut for n, weight in enumerate(work.fp8) for cut in _cut(n, weight.stripes, weight.stripe_bytes))
    for found in pool.map(compare, grouped(units, tiles.LIMITS.compare_bytes)):
        for number, comparison in found:
            comparisons[number].merge(comparison)
    return comparisons


def _value_units(work: ShardWork, comparisons: list[Comparison | None]) -> Iterator[tuple[_Units, int]]:
    """(units, their bytes on each side): each at most a piece of work."""
    for number, converted in enumerate(work.converted):
        if comparisons[number] is not None:
            units, size = count_units(converted)
            yield from _cut(number, units, size)


def _copy_units(work: ShardWork) -> Iterator[tuple[_Units, int]]:
    for number, (tensor, _) in enumerate(work.copies):
        yield from _cut(number, tensor.nbytes, 1)


def _cut(number: int, units: int, size: int) -> Iterator[tuple[_Units, int]]:
    if units * size <= tiles.LIMITS.compare_bytes:
        yield _Units(number, 0, units), units * size
        return
    for first, last in spans(0, units, tiles.LIMITS.compare_bytes // size):
        yield _Units(number, first, last), (last - first) * size
