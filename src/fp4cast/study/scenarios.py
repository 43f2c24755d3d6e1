"""The 27 scenarios of the original experiment, on NumPy: what each tensor looks like before it becomes MXFP4.

Shapes and distributions follow the description of NVIDIA Model-Optimizer's pull request 1364; the random numbers differ
(it drew them on a GPU). Names are the original's: "spread 17" has bands over 17 binades, and exponents over 19. Each
scenario has a generator of its own: leaving one out does not change the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fp4cast.study.tensors import Mxfp4, Values, quantize

SEED = 20260428
LARGE = 1 << 20  # weights; --quick leaves out what is larger
_ROWS, _COLUMNS = 256, 1024

Rng = np.random.Generator
Make = Callable[[Rng], Values]


def generator(name: str, seed: int = SEED) -> Rng:
    """A scenario's generator of random numbers."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


@dataclass(frozen=True)
class Scenario:
    """One tensor to cast.

    Attributes:
        name: what the page calls it.
        about: what it holds, in a few words.
        build: makes it from random numbers.
        elements: how many weights it has.
        original: whether it is one of the 27.
        extra: what must be installed for it, by module; most need nothing.
        weights: makes what was quantized; None where the blocks themselves are made up.
    """

    name: str
    about: str
    build: Callable[[Rng], Mxfp4]
    elements: int = _ROWS * _COLUMNS
    original: bool = False
    extra: tuple[str, ...] = ()
    weights: Make | None = None

    def make(self, seed: int = SEED) -> Mxfp4:
        """The tensor; another seed makes another of its kind (but for experts, gate and up, and real weights)."""
        return self.build(generator(self.name, seed))


def _normal(rng: Rng, rows: int = _ROWS, columns: int = _COLUMNS) -> npt.NDArray[np.float32]:
    return rng.standard_normal((rows, columns), dtype=np.float32)


def _signs(rng: Rng, *shape: int) -> Values:
    return np.asarray(rng.choice(np.array([-1.0, 1.0], np.float32), shape))


def _heavy_tail(rng: Rng) -> Values:
    return np.asarray(_normal(rng) * np.abs(_normal(rng)))


def _rare_outliers(rng: Rng) -> Values:
    x = _normal(rng) * np.float32(0.05)
    return np.where(rng.random(x.shape) < 1e-3, 100 * _signs(rng, *x.shape), x)


def _bands(rng: Rng, std: float, lowest: int, binades: int) -> Values:
    """Sixteen bands of rows, each of another power of two, over so many binades."""
    x = _normal(rng) * np.float32(std)
    exponents = lowest + np.arange(16) * binades // 15
    return np.asarray(np.ldexp(x, np.repeat(exponents, _ROWS // 16)[:, None]))


def _spread(binades: int) -> Make:
    return lambda rng: _bands(rng, 0.5, -(binades // 2), binades)


def _some_larger(std: float, probability: float, factor: float, rows: int = _ROWS, columns: int = _COLUMNS) -> Make:
    """Weights as they are initialised, a few of them much larger."""

    def make(rng: Rng) -> Values:
        x = _normal(rng, rows, columns) * np.float32(std)
        x[rng.random(x.shape, dtype=np.float32) < probability] *= np.float32(factor)
        return x

    return make


def _rows_larger(rows: int, columns: int, std: float, many: int, factor: float) -> Make:
    def make(rng: Rng) -> Values:
        x = _normal(rng, rows, columns) * np.float32(std)
        x[rng.permutation(rows)[:many]] *= np.float32(factor)
        return x

    return make


def _mostly_zero(rng: Rng) -> Values:
    x = _normal(rng) * np.float32(0.5)
    return np.where(rng.random(x.shape) < 0.01, x, np.float32(0))


def _bimodal(rng: Rng) -> Values:
    x = _normal(rng)
    return np.asarray(x * np.where(rng.random(x.shape) < 0.5, 8.0, 0.01))


def _power_law(rng: Rng) -> Values:
    tail = np.maximum(rng.random((_ROWS, _COLUMNS)), 1e-6) ** (-1 / 1.5) - 1
    return np.asarray(0.05 * tail * _signs(rng, _ROWS, _COLUMNS))


def _per_row(rng: Rng) -> Values:
    x = _normal(rng) * np.float32(0.01)
    columns = rng.permutation(_COLUMNS)[:16]
    for row in rng.permutation(_ROWS)[:4]:
        x[row, columns] = 30 * _signs(rng, 16)
    return x


def _per_column(rng: Rng) -> Values:
    x = _normal(rng) * np.float32(0.01)
    x[:, rng.permutation(_COLUMNS)[:8]] *= np.float32(200)
    return x


def single_outlier(rng: Rng, outlier: float = 1e4) -> Values:
    """Small weights, and one in the middle that is enormous."""
    x = _normal(rng) * np.float32(0.005)
    x[_ROWS // 2, _COLUMNS // 2] = outlier
    return x


def _original(name: str, about: str, make: Make, shape: tuple[int, ...] = (_ROWS, _COLUMNS)) -> Scenario:
    elements = int(np.prod(shape))
    return Scenario(name, about, lambda rng: quantize(make(rng), shape), elements, True, weights=make)


ORIGINAL = (
    _original("uniform", "uniform in [−1, 1]", lambda rng: rng.uniform(-1, 1, (_ROWS, _COLUMNS))),
    _original("gaussian", "N(0, 1)", _normal),
    _original("heavy tail", "N(0, 1) · |N(0, 1)|", _heavy_tail),
    _original("rare outliers", "N(0, 0.05²), one in a thousand ±100", _rare_outliers),
    _original("mixed block scales", "bands of rows over 25 binades", lambda rng: _bands(rng, 0.3, -12, 25)),
    _original("narrow range", "N(1, 0.5²)", lambda rng: 1 + _normal(rng) * np.float32(0.5)),
    _original("typical LLM weight", "N(0, 1/1024), one in 10⁴ 50 times as large", _some_larger(1 / 32, 1e-4, 50)),
    _original("mostly zero", "1 % N(0, 0.5²), else zero", _mostly_zero),
    _original("spread 15", "bands of rows over 15 binades", _spread(15)),
    _original("spread 17", "bands of rows over 17 binades", _spread(17)),
    _original("spread 18", "bands of rows over 18 binades", _spread(18)),
    _original("spread 50", "bands of rows over 50 binades", _spread(50)),
    _original("bimodal", "half N(0, 0.01²), half N(0, 8²)", _bimodal),
    _original("power law", "Pareto 1.5", _power_law),
    _original("per-row outliers", "N(0, 0.01²), 4 rows with 16 of ±30", _per_row),
    _original("per-column outliers", "N(0, 0.01²), 8 columns 200 times as large", _per_column),
    _original("single extreme outlier", "N(0, 0.005²), one 10⁴", single_outlier),
    _original("subnormal-heavy", "N(0, 10⁻¹⁶)", lambda rng: _normal(rng) * np.float32(1e-8)),
    _original("saturating", "N(0, 1) cut at ±6", lambda rng: np.clip(_normal(rng), -6, 6)),
    _original(
        "bimodal signs",
        "±3 + N(0, 0.1²)",
        lambda rng: 3 * _signs(rng, _ROWS, _COLUMNS) + _normal(rng) * np.float32(0.1),
    ),
    _original("constant", "1.5 everywhere", lambda _: np.full((_ROWS, _COLUMNS), 1.5)),
    _original("QKV weight", "N(0, 1/4096), few 30 times", _some_larger(1 / 64, 5e-5, 30, 4096, 4096), (4096, 4096)),
    _original(
        "MLP gate and up", "N(0, 1/4096), 32 rows 5 times", _rows_larger(1024, 4096, 1 / 64, 32, 5), (1024, 4096)
    ),
    _original("embedding", "N(0, 0.5²), 8 rows 20 times", _rows_larger(2048, 1024, 0.5, 8, 20), (2048, 1024)),
    _original("LayerNorm gain", "N(1, 0.05²)", lambda rng: 1 + _normal(rng, 32) * np.float32(0.05), (32, 1024)),
    _original("convolution", "N(0, 0.1²)", lambda rng: _normal(rng, 64) * np.float32(0.1), (64, 64, 4, 4)),
    _original("large flat", "N(0, 0.02²)", lambda rng: _normal(rng, 1024, 4096) * np.float32(0.02), (1024, 4096)),
)
