"""What a checkpoint is that fp4cast does not cast, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.quantization_config import manifest

__all__ = ["REFUSED", "describe"]

# (suffix, dtype, suffix of the partner, its dtypes, what it is, what to do): layouts that are not ours to cast.
_CAST_ALREADY = "There is nothing to cast."
_NOT_YET = "fp4cast does not read this layout yet; it reads gpt-oss, DeepSeek-V4 and compressed-tensors MXFP4."
REFUSED = (
    (".weight_packed", "U8", ".weight_scale", {"F8_E4M3"}, "already NVFP4 (compressed-tensors)", _CAST_ALREADY),
    (".weight", "U8", ".weight_scale", {"F8_E4M3"}, "already NVFP4 (ModelOpt)", _CAST_ALREADY),
    ("_proj", "U8", "_proj_weight_scale", {"F8_E4M3"}, "already NVFP4 (ModelOpt, fused experts)", _CAST_ALREADY),
    (".weight", "U32", ".scales", {"U8"}, "MLX mxfp4 (codes as U32)", _NOT_YET),
    (".weight", "U8", ".weight_scale", {"U8", "F8_E8M0"}, "MXFP4 as MiMo, Quark or ModelOpt write it", _NOT_YET),
    (".weight", "I8", ".weight_scale_inv", {"U8", "F8_E8M0"}, "MXFP4 as Ling-3.0 writes it", _NOT_YET),
)


def _refused(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, str]]:
    for suffix, dtype, partner, dtypes, what, hint in REFUSED:
        for name, tensor in tensors.items():
            if tensor.dtype == dtype and name.endswith(suffix):
                scales = tensors.get(name.removesuffix(suffix) + partner)
                if scales is not None and scales.dtype in dtypes:
                    yield f"this checkpoint is {what}", hint


def describe(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """What a checkpoint without castable weights is, and what to do, in words."""
    for found in _refused(tensors):
        return found
    if any(name.endswith((".mlp1_weight.blocks", ".mlp2_weight.blocks")) for name in tensors):
        return "this is gpt-oss's original/ layout", "Pass the directory above it, which holds the Hugging Face layout."
    quantization = manifest(config)[1]
    if quantization.get("quant_method") == "quark":
        return "this is a Quark checkpoint in its legacy layout", _NOT_YET
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    dtype = max(sizes, key=lambda d: sizes[d], default="empty")
    method = quantization.get("quant_method")
    return (
        f"no MXFP4 weights: the checkpoint is {dtype}" + (f" (quant_method {method!r})" if method else ""),
        "fp4cast casts MXFP4 checkpoints; to quantize another one use a quantization tool.",
    )
