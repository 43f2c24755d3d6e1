"""Sweeps over many tensors: error against spread, outliers of every size, other seeds, a window that moves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fp4cast.casting.tight_rule import E_MAX
from fp4cast.formats import E8M0_BIAS, MX_BLOCK
from fp4cast.study.algorithms import ALGORITHMS, closed_form, hybrid, requantize, search, tight, verbatim
from fp4cast.study.measure import measure
from fp4cast.study.scenarios import LARGE, ORIGINAL, generator, single_outlier
from fp4cast.study.tensors import Mxfp4, quantize

SPREADS = range(61)
_BLOCKS = 256


def spread_curve(spreads: range = SPREADS) -> Iterator[tuple[int, dict[str, float]]]:
    """(spread, relative root-mean-square error by algorithm) of Gaussian blocks, exponents uniform over the spread."""
    for spread in spreads:
        rng = generator(f"spread curve {spread}")
        k = rng.integers(-spread, 1, _BLOCKS)
        k[:2] = 0, -spread
        codes = quantize(rng.standard_normal((_BLOCKS, MX_BLOCK))).codes
        source = Mxfp4(codes, (k + E8M0_BIAS).astype(np.uint8))
        errors = {name: measure(source, algorithm(source)) for name, algorithm in ALGORITHMS.items()}
        yield spread, {name: math.sqrt(each.squared / each.energy) for name, each in errors.items()}


@dataclass(frozen=True)
class Outlier:
    """A single outlier under Algorithms 1, 3 and 4.

    Attributes:
        clamped: squared error of 3 over that of 1.
        flushed: like `clamped`, where block scales of 2^-10 and less become zero.
        clamped_worse: whether 3 errs more than 1, compared exactly.
        flushed_worse: like `clamped_worse`, where they become zero.
        ours_worse: whether 4 errs more than 1.
        continuous: whether 4 took a tensor scale that is no power of two.
    """

    clamped: float
    flushed: float
    clamped_worse: bool
    flushed_worse: bool
    ours_worse: bool
    continuous: bool


def outliers(sizes: int) -> list[Outlier]:
    """`sizes` outliers, spread evenly over one binade from the scenario's outlier up."""
    return [_outlier(1e4 * 2 ** (size / sizes)) for size in range(sizes)]


def _outlier(value: float) -> Outlier:
    source = quantize(single_outlier(generator("single extreme outlier"), value))
    m, ours = source.k_max - E_MAX, tight(source)
    one, three = measure(source, requantize(source)).squared, measure(source, closed_form(source)).squared
    one_flushed = measure(source, requantize(source, flush=True)).squared
    three_flushed = measure(source, hybrid(source, m, flush=True)).squared
    return Outlier(
        float(three / one),
        float(three_flushed / one_flushed),
        three > one,
        three_flushed > one_flushed,
        measure(source, ours).squared > one,
        ours.m is None,
    )


def gains(names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """SNR of 3 over that of 2-search in dB, by scenario: with block scales clamped, and flushed to zero."""
    found = {}
    for scenario in ORIGINAL:
        if scenario.name in names:
            source = scenario.make()
            two = measure(source, search(source)).squared
            threes = [measure(source, hybrid(source, source.k_max - E_MAX, flush)).squared for flush in (False, True)]
            clamped, flushed = (10 * math.log10(two / three) for three in threes)
            found[scenario.name] = clamped, flushed
    return found


def exact_by_seed(seeds: int) -> dict[str, int]:
    """For how many of `seeds` other tensors Algorithm 3 is exact, by scenario, for the smaller of the 27."""
    small = [scenario for scenario in ORIGINAL if scenario.elements <= LARGE]
    return {scenario.name: sum(_exact(scenario.make(seed)) for seed in range(1, seeds + 1)) for scenario in small}


def _exact(source: Mxfp4) -> bool:
    m = source.k_max - E_MAX
    return not source.outside(m) or measure(source, hybrid(source, m)).exact


def window_costs(source: Mxfp4) -> tuple[float, float]:
    """How many times the squared error of codes kept verbatim grows when m = k_max - 8 moves a binade down, and up."""
    m = source.k_max - E_MAX
    here, down, up = (measure(source, verbatim(source, each)).squared for each in (m, m - 1, m + 1))
    return _times(down, here), _times(up, here)


def _times(a: Fraction, b: Fraction) -> float:
    return float(a / b) if b else math.inf
