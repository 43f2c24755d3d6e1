"""Weights in FP8 beside the cast ones, as ModelOpt's `FP8_PB_WO` stores them: what its writer and its readers share.

A weight [N, K] is E4M3 codes [N, K] and FP32 scales [N / 128, 1, K / 128, 1], rounded up: one for each block of
128 x 128. Read in NVIDIA/Model-Optimizer at 224bbd0, examples/kimi/kimi_k3/quantize_to_nvfp4.py, and in vLLM 0.32,
model_executor/layers/quantization/modelopt.py (`KFp8Block128`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from fp4cast.checkpoints.header import Tensor
from fp4cast.formats import Fp8, one_of

BLOCK = 128
ALGORITHM = "FP8_PB_WO"
LAYOUT = "modelopt"  # the layout that has it
CODES, SCALES = "F8_E4M3", "F32"
FP8_CHOICES: tuple[Fp8, ...] = get_args(Fp8)


def find_choice(name: str) -> Fp8:
    """The choice of that name; a UsageError where there is none."""
    return one_of("--fp8", name, FP8_CHOICES)


def weight_name(module: str) -> str:
    """The tensor of a module's codes, or of its weight where that is not quantized."""
    return f"{module}.weight"


def scale_name(module: str) -> str:
    """The tensor of a module's scales."""
    return f"{module}.weight_scale"


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Shape of the scales of a weight [N, K]."""
    rows, columns = (-(-size // BLOCK) for size in shape)
    return rows, 1, columns, 1


def fp8_tensors(module: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of both tensors of a weight [N, K], by name."""
    return {weight_name(module): (CODES, shape), scale_name(module): (SCALES, scale_shape(shape))}


def stored_fp8(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules of a checkpoint whose weights are stored so, in its order."""
    found = []
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        scales = tensors.get(scale_name(module))
        if module == name or scales is None or (tensor.dtype, len(tensor.shape)) != (CODES, 2):
            continue
        if (scales.dtype, scales.shape) == (SCALES, scale_shape(tensor.shape)):
            found.append(module)
    return found
