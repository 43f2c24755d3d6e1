"""The figures of one tensor that a report lists: of one that is not exact, and of one that was quantized to FP8."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


def _number(value: float) -> float | None:
    """A number for JSON; None for NaN, which JSON lacks and a damaged scale decodes to."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class InexactTensor:
    """A tensor that could not be written exactly, with its error against the source's values.

    Attributes:
        name: the module.
        rounded_half_blocks: how many half-blocks of 16 weights hold a rounded value.
        max_abs_error: largest absolute error of a weight.
        mse: mean squared error over all weights of the tensor.
        snr_db: 10 log10(energy of the source / squared error).
    """

    name: str
    rounded_half_blocks: int
    max_abs_error: float
    mse: float
    snr_db: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "name": self.name,
            "rounded_half_blocks": self.rounded_half_blocks,
            "max_abs_error": _number(self.max_abs_error),
            "mse": _number(self.mse),
            "snr_db": _number(self.snr_db),
        }


def inexact_tensor(
    name: str, rounded: int, elements: int, squared_error: float, max_error: float, energy: float
) -> InexactTensor:
    """Compute the figures from sums: squared_error and energy over all `elements` weights."""
    snr = 10 * math.log10(energy / squared_error) if energy > 0 and squared_error > 0 else 0.0
    if rounded and energy > 0 and not squared_error:
        snr = math.inf  # nothing but signs of zeros
    return InexactTensor(name, rounded, max_error, squared_error / elements, snr)


def signal_to_noise(energy: float, squared_error: float) -> float:
    """10 log10(energy / squared error) in dB; infinity where nothing was lost, NaN where the error is none."""
    if not squared_error > 0:
        return math.inf if squared_error == 0 else math.nan
    return 10 * math.log10(energy / squared_error) if energy else -math.inf


@dataclass(frozen=True)
class Fp8Tensor:
    """A weight that is unquantized in the source and FP8 in the destination.

    Attributes:
        name: the module.
        snr_db: 10 log10(energy of the source / squared error).
    """

    name: str
    snr_db: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object; no number where nothing was lost, as of zeros."""
        return {"name": self.name, "snr_db": _number(self.snr_db)}
