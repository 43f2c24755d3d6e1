"""Compare one shard of the destination: the work as data, the comparison, and its findings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.header import Tensor
from fp4cast.formats import usable_scale
from fp4cast.parallel.ranges import grouped, spans
from fp4cast.parallel.workers import Workers
from fp4cast.verification.fast_path import Converted, compare_bytes, compare_units, count_units, energy_of_units
from fp4cast.verification.fp8_blocks import Fp8Comparison, Fp8Weight, compare_stripes
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
        scales = [_scales(converted, files) for converted in work.converted]
        pool.advance(sum(4 for stored in scales for scale in stored if scale is not None))
        comparisons = _compare_values(work, scales, files, pool)
        copies = _compare_copies(work, files, pool)
        return ShardFindings(comparisons, scales, copies, _compare_fp8(work, files, pool))


def _scales(converted: Converted, files: Files) -> StoredScales:
    scalar = converted.input_scale
    return StoredScales(_scalar(converted.tensor_scale, files), None if scalar is None else _scalar(scalar, files))


def _scalar(tensor: Tensor, files: Files) -> float:
    return float(files[tensor.path].read(tensor.start, 4).view("<f4")[0])


def _compare_values(
    work: ShardWork, scales: list[StoredScales], files: Files, pool: Workers
) -> list[Comparison | None]:
    comparisons = [Comparison() if usable_scale(stored.tensor_scale) else None for stored in scales]

    def compare(piece: list[_Units]) -> list[tuple[int, Comparison]]:
        found = []
        with pool.one_at_a_time_if_many(len(piece)):
            for units in piece:
                converted, stored = work.converted[units.number], scales[units.number].tensor_scale
                scale = 1.0 / stored if converted.form.reciprocal else stored
                comparison = compare_units(converted, units.first, units.last, scale, files, pool.advance)
                found.append((units.number, comparison))
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
    for first, last in spans(0, units, tiles.LIMITS.compare_bytes // size):
        yield _Units(number, first, last), (last - first) * size
