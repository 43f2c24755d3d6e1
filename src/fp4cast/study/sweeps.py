"""What single tensors do not show: error against spread, outliers of every size, other seeds, a window that moves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from fp4cast.exact import E_MAX
from fp4cast.formats import E8M0_BIAS, MX_BLOCK
from fp4cast.study.algorithms import ALGORITHMS, closed_form, hybrid, requantize, tight, verbatim
from fp4cast.study.measure import measure
from fp4cast.study.scenarios import LARGE, ORIGINAL, generator, single_outlier
from fp4cast.study.tensors import Mxfp4, quantize

__all__ = ["SPREADS", "exact_by_seed", "outlier_ratios", "spread_curve", "window_costs"]

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


def outlier_ratios(sizes: int) -> dict[str, list[float]]:
    """Squared error over that of 1 for single outliers over a binade; "3 flushed": 3 and 1 without a smallest scale."""
    ratios: dict[str, list[float]] = {"3": [], "3 flushed": [], "4": []}
    for size in range(sizes):
        source = quantize(single_outlier(generator("single extreme outlier"), 1e4 * 2 ** (size / sizes)))
        standard = measure(source, requantize(source)).squared
        ratios["3"].append(float(measure(source, closed_form(source)).squared / standard))
        ratios["4"].append(float(measure(source, tight(source)).squared / standard))
        flushed = measure(source, hybrid(source, source.k_max - E_MAX, flush=True)).squared
        ratios["3 flushed"].append(float(flushed / measure(source, requantize(source, flush=True)).squared))
    return ratios


def exact_by_seed(seeds: int) -> dict[str, int]:
    """In how many of so many other tensors of a kind Algorithm 3 is exact, for the smaller of the 27."""
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
