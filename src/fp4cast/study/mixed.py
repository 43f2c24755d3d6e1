"""Mixed formats: the same BF16 weights in FP8, as `--fp8 attention` writes attention, and in the 4 bits of experts.

Weights are rounded here, not cast: nothing is exact, and errors are measured in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fp4cast.formats import E2M1, E4M3, E4M3_MAX, NV_BLOCK, TENSOR_TOP, Float64s, mxfp4_values
from fp4cast.study.scenarios import Scenario, generator
from fp4cast.study.tensors import nearest, quantize

MIXED = (
    "gaussian", "heavy tail", "typical LLM weight", "per-column outliers", "single extreme outlier", "real weights",
)  # fmt: skip
_FP8_BLOCK = 128


def bf16(values: Float64s) -> Float64s:
    """The nearest numbers of eight significant bits, ties to even."""
    significands, exponents = np.frexp(values)
    return np.asarray(np.ldexp(np.rint(significands * 256), exponents - 8))


def _rounded(table: Float64s, values: Float64s) -> Float64s:
    return np.copysign(table[nearest(table, np.abs(values))], values)


def fp8(values: Float64s) -> Float64s:
    """E4M3 in blocks of 128 x 128, none of zeros: the scale amax / 448 and the quotients are BF16, as in `--fp8`."""
    rows, columns = values.shape
    blocks = values.reshape(rows // _FP8_BLOCK, _FP8_BLOCK, columns // _FP8_BLOCK, _FP8_BLOCK)
    scales = bf16(np.abs(blocks).max(axis=(1, 3), keepdims=True) / E4M3_MAX)
    return (_rounded(E4M3.values[:0x7F], bf16(blocks / scales)) * scales).reshape(values.shape)


def mxfp4(values: Float64s) -> Float64s:
    """MXFP4, as the study's tensors are made."""
    made = quantize(values)
    return mxfp4_values(made.codes, made.exponents[:, None]).reshape(values.shape)


def nvfp4(values: Float64s) -> Float64s:
    """Standard NVFP4: S = amax / (6 * 448), s = E4M3(amax / (6 S)) of 16, from 2^-9 on, both of FP32 quotients."""
    halves = np.abs(values).astype(np.float32).reshape(-1, NV_BLOCK)
    scale = halves.max() / np.float32(TENSOR_TOP)
    wanted = halves.max(axis=1, keepdims=True) / (np.float32(6) * scale)
    steps = E4M3.values[np.maximum(nearest(E4M3.values[:0x7F], wanted), 1)] * float(scale)
    return (_rounded(E2M1.values[:8], values.reshape(-1, NV_BLOCK) / steps) * steps).reshape(values.shape)


FORMATS: dict[str, Callable[[Float64s], Float64s]] = {"FP8": fp8, "MXFP4": mxfp4, "NVFP4": nvfp4}


@dataclass(frozen=True)
class Mixed:
    """Signal to noise of one scenario's weights by format, in dB."""

    name: str
    snr_db: dict[str, float]

    def gain_db(self, other: str) -> float:
        """By how much FP8 is above another format."""
        return self.snr_db["FP8"] - self.snr_db[other]

    def to_json(self) -> dict[str, Any]:
        """The document's form."""
        return {"name": self.name, "snr_db": self.snr_db}


def compare(scenario: Scenario) -> Mixed:
    """Round a scenario's weights, before they were MXFP4, to BF16, and those to each format."""
    if scenario.weights is None:
        raise ValueError(f"{scenario.name}: has no weights before MXFP4")
    values = bf16(np.asarray(scenario.weights(generator(scenario.name)), np.float64))
    energy = float((values**2).sum())
    errors = {name: float(((written(values) - values) ** 2).sum()) for name, written in FORMATS.items()}
    return Mixed(scenario.name, {name: 10 * math.log10(energy / error) for name, error in errors.items()})
