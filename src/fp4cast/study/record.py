"""One scenario under all algorithms, and which of them win."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fp4cast.casting.tight_rule import E_MAX
from fp4cast.study.algorithms import ALGORITHMS, sweep_errors, unscaled
from fp4cast.study.measure import Errors, measure
from fp4cast.study.scenarios import Scenario
from fp4cast.study.tensors import Nvfp4


@dataclass(frozen=True)
class Record:
    """The results of one scenario.

    Attributes:
        scenario: the scenario.
        shape: the values' shape.
        k_min: smallest exponent over blocks that hold a non-zero code.
        k_max: largest.
        blocks: how many blocks of 32.
        outside: how many blocks with a non-zero code lie outside of the window of m = k_max - 8.
        best_m: every m under which Algorithm 3 errs least.
        scales: (m or None, S) by algorithm.
        errors: by algorithm.
        unscaled: of Algorithm 4 with S = 1, which competes with none.
    """

    scenario: Scenario
    shape: tuple[int, ...]
    k_min: int
    k_max: int
    blocks: int
    outside: int
    best_m: tuple[int, ...]
    scales: dict[str, tuple[int | None, float]]
    errors: dict[str, Errors]
    unscaled: Errors

    @property
    def spread(self) -> int:
        """Binades between the smallest and the largest exponent."""
        return self.k_max - self.k_min

    def winners(self, names: Sequence[str] = tuple(ALGORITHMS)) -> list[str]:
        """The algorithms of least squared error, compared exactly; more than one is a tie."""
        least = min(self.errors[name].squared for name in names)
        return [name for name in names if self.errors[name].squared == least]

    def ratio(self, name: str, other: str) -> Fraction | None:
        """Squared error of one over that of another; None where the other is exact."""
        return self.errors[name].squared / self.errors[other].squared if self.errors[other].squared else None

    def to_json(self) -> dict[str, Any]:
        """The document's form."""
        return {
            "name": self.scenario.name,
            "about": self.scenario.about,
            "original": self.scenario.original,
            "shape": list(self.shape),
            "spread": self.spread,
            "k_min": self.k_min,
            "k_max": self.k_max,
            "blocks": self.blocks,
            "outside": self.outside,
            "winners": self.winners(),
            "sweep_best_m": [self.best_m[0], self.best_m[-1]],
            "algorithms": {name: _result(*self.scales[name], errors) for name, errors in self.errors.items()},
            "unscaled": _result(0, 1.0, self.unscaled),
        }


def _result(m: int | None, tensor_scale: float, errors: Errors) -> dict[str, Any]:
    return {
        "m": m,
        "tensor_scale": tensor_scale,
        "mse": errors.mse,
        "max_abs_error": float(errors.largest),
        "snr_db": errors.snr_db,
        "exact": errors.exact,
    }


def examine(scenario: Scenario) -> Record:
    """Make a scenario's tensor, cast it by every algorithm, and measure each result."""
    source = scenario.make()
    written: dict[str, Nvfp4] = {name: algorithm(source) for name, algorithm in ALGORITHMS.items()}
    sweep = sweep_errors(source)
    least = min(sweep.values())
    return Record(
        scenario,
        source.shape,
        source.k_min,
        source.k_max,
        len(source.exponents),
        source.outside(source.k_max - E_MAX),
        tuple(m for m, error in sweep.items() if error == least),
        {name: (each.m, each.tensor_scale) for name, each in written.items()},
        {name: measure(source, each) for name, each in written.items()},
        measure(source, unscaled(source)),
    )
