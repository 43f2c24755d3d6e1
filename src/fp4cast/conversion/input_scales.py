"""Activation scales for W4A4: one number for all, or calibrated amax values by projection.

NVFP4's `input_scale` is amax / (6 * 448) = amax / 2688 (NVIDIA ModelOpt's export convention): the largest activation
then takes the largest code under the largest block scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Literal

import numpy as np

from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.header import UNQUANTIZED, Tensor, read_header
from fp4cast.checkpoints.json_files import read_json
from fp4cast.errors import InputScaleError, UsageError
from fp4cast.formats import TENSOR_TOP, float_values

# An input_scale and its reciprocal must be normal FP32 numbers: a GPU flushes others to zero.
_LEAST = float(np.finfo(np.float32).tiny)
_MOST = 1 / _LEAST

ScalesPer = Literal["bank", "expert"]  # what shares a calibrated scale: all experts of a layer, or none
InputScalesLike = float | str | Path | Mapping[str, float]

_WAYS_OUT = (
    "Pass --input-scales FILE (safetensors or JSON: projection name -> amax of its input; from fp4cast calibrate), "
    "or --input-scales NUMBER for one input_scale everywhere (1.0 is what NVIDIA's Kimi-K3 ships, uncalibrated)."
)


@dataclass(frozen=True)
class InputScales:
    """The source of input scales: one constant, or an amax for each projection."""

    constant: float | None
    amax: Mapping[str, float]
    origin: str

    def scale(self, modules: Sequence[str]) -> np.float32:
        """The input_scale that merged projections share: that of the largest amax among them."""
        if self.constant is not None:
            return np.float32(self.constant)
        return np.float32(max(self.amax[module] for module in modules)) / np.float32(TENSOR_TOP)

    def require(self, modules: Iterable[str]) -> None:
        """Check that every projection has a usable value; other names are ignored.

        Raises:
            InputScaleError: a value is missing or unusable; the message names the first.
        """
        if self.constant is not None:
            return
        wanted = list(modules)
        if missing := [module for module in wanted if module not in self.amax]:
            raise InputScaleError(
                f"{self.origin}: no amax for {len(missing)} of {len(wanted)} projections, the first is {missing[0]!r}; "
                f"the file has {len(self.amax)} names, such as {next(iter(self.amax), None)!r}. "
                "An engine would read uninitialised memory for a missing one."
            )
        for module in wanted:
            _check(self.origin, module, self.amax[module], TENSOR_TOP)


def _number(value: object) -> float:
    """A value as a float; NaN if it is not a number."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def _check(origin: str, name: str, number: float, unit: float) -> None:
    if not _LEAST <= number / unit <= _MOST:
        limits = f"{_LEAST * unit:.3g} to {_MOST * unit:.3g}"
        raise InputScaleError(f"{origin}: {name}: expected a number from {limits}, got {number!r}. {_WAYS_OUT}")


def _scalar(file: File, tensor: Tensor) -> float:
    if tensor.dtype not in UNQUANTIZED or math.prod(tensor.shape) != 1:
        raise InputScaleError(f"{tensor.path}: {tensor}: expected one floating-point number")
    return float(float_values(file.read(tensor.start, tensor.nbytes), tensor.dtype)[0])


def _read_file(path: Path) -> dict[str, object]:
    if path.suffix == ".json":
        return dict(read_json(path))
    if path.suffix != ".safetensors":
        raise InputScaleError(f"{path}: expected a number, a .json or a .safetensors file. {_WAYS_OUT}")
    shard = read_header(path)
    with File(path) as file:
        return {name: _scalar(file, tensor) for name, tensor in shard.tensors.items()}


def load_input_scales(value: InputScalesLike | None) -> InputScales:
    """Read `--input-scales`.

    Args:
        value: a number (or its text) for one input_scale everywhere; or a mapping, or the path of a JSON or
            safetensors file, of projection name -> amax of its input.

    Raises:
        UsageError: nothing was given.
        InputScaleError: an unusable file or constant; `require` checks the values of a table.
    """
    if value is None:
        raise UsageError(f"W4A4 needs an activation scale for every projection. {_WAYS_OUT}")
    table: dict[str, object]
    if isinstance(value, Mapping):
        origin, table = "input_scales", dict(value)
    else:
        try:
            number = float(value) if not isinstance(value, Path) else None
        except OverflowError:
            number = math.inf
        except ValueError:
            number = None
        if number is not None:
            _check("input_scales", "the constant", number, 1.0)
            return InputScales(number, {}, "input_scales")
        origin, table = str(value), _read_file(Path(str(value)))
    return InputScales(None, {name: _number(amax) for name, amax in table.items()}, origin)
