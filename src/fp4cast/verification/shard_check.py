"""What verification must compare, as data, and the work of comparing it; part of the independent witness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.header import Tensor
from fp4cast.parallel.ranges import grouped, spans
from fp4cast.parallel.workers import Workers
from fp4cast.verification.fast_path import Cast, compare_bytes, compare_units, count_units, energy_of_units
from fp4cast.verification.values import Comparison

__all__ = ["Checks", "Findings", "perform", "usable"]

PIECE_BYTES = 16 << 20  # what a worker compares before it takes the next piece, each side


@dataclass
class Checks:
    """Tensors of one shard of the destination that are to be compared.

    Attributes:
        casts: those that were cast.
        copies: (source, destination) of those that were not.
    """

    casts: list[Cast] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass
class Findings:
    """What was found, in the order of the checks.

    Attributes:
        comparisons: of every cast, None where its tensor scale is no number to multiply with.
        scales: of every cast, (tensor scale, input scale or None) as stored.
        copies: of every copy, the first byte that differs, or None.
    """

    comparisons: list[Comparison | None]
    scales: list[tuple[float, float | None]]
    copies: list[int | None]


@dataclass(frozen=True, slots=True)
class _Part:
    """Units of a cast, or bytes of a copy: [first, last) of the item of that number."""

    number: int
    first: int
    last: int


def usable(value: float) -> bool:
    """Whether a stored scale is a positive normal FP32 number."""
    return math.isfinite(value) and value >= float(np.finfo(np.float32).tiny)


def perform(checks: Checks, pool: Workers) -> Findings:
    """Compare everything in `checks`."""
    with Files() as files:
        scales = [_scales(cast, files) for cast in checks.casts]
        pool.advance(sum(4 for pair in scales for scale in pair if scale is not None))
        comparisons = [Comparison() if usable(stored) else None for stored, _ in scales]

        def compare(piece: list[_Part]) -> list[tuple[int, Comparison]]:
            found = []
            with pool.turn(len(piece)):
                for part in piece:
                    cast, (stored, _) = checks.casts[part.number], scales[part.number]
                    scale = 1.0 / stored if cast.reciprocal else stored
                    found.append((part.number, compare_units(cast, part.first, part.last, scale, files, pool.advance)))
            return found

        for found in pool.map(compare, grouped(_cast_parts(checks, comparisons), PIECE_BYTES)):
            for number, comparison in found:
                if (whole := comparisons[number]) is not None:
                    whole.merge(comparison)
        for cast, whole in zip(checks.casts, comparisons, strict=True):
            if whole is not None and whole.rounded:
                whole.energy = energy_of_units(cast, files, pool.check)
        return Findings(comparisons, scales, _compare_copies(checks, files, pool))


def _compare_copies(checks: Checks, files: Files, pool: Workers) -> list[int | None]:
    copies: list[int | None] = [None] * len(checks.copies)

    def compare(piece: list[_Part]) -> list[tuple[int, int | None]]:
        with pool.turn(len(piece)):
            return [
                (p.number, compare_bytes(*checks.copies[p.number], p.first, p.last - p.first, files, pool.advance))
                for p in piece
            ]

    for found in pool.map(compare, grouped(_copy_parts(checks), PIECE_BYTES)):
        for number, at in found:
            if copies[number] is None:
                copies[number] = at
    return copies


def _scales(cast: Cast, files: Files) -> tuple[float, float | None]:
    return _scalar(cast.tensor_scale, files), None if cast.input_scale is None else _scalar(cast.input_scale, files)


def _scalar(tensor: Tensor, files: Files) -> float:
    return float(files[tensor.path].read(tensor.start, 4).view("<f4")[0])


def _cast_parts(checks: Checks, comparisons: list[Comparison | None]) -> Iterator[tuple[_Part, int]]:
    """(part, its bytes a side): at most a piece each."""
    for number, cast in enumerate(checks.casts):
        if comparisons[number] is not None:
            units, size = count_units(cast)
            yield from _cut(number, units, size)


def _copy_parts(checks: Checks) -> Iterator[tuple[_Part, int]]:
    for number, (tensor, _) in enumerate(checks.copies):
        yield from _cut(number, tensor.nbytes, 1)


def _cut(number: int, units: int, size: int) -> Iterator[tuple[_Part, int]]:
    for first, last in spans(0, units, PIECE_BYTES // size):
        yield _Part(number, first, last), (last - first) * size
