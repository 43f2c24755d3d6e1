"""Whether the checkpoint filled every scale, bias and input scale of the NVFP4 layers: engines lose them silently.

Before loading, all of these are filled with NaN; what still is NaN after it was not loaded. This serves every layer
with NVFP4's two scales, whatever its method and model, of checkpoints in the layouts that fp4cast writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fp4cast.errors import CheckpointError
from fp4cast.layouts.engine_view import read_claims

_TENSOR_SCALES = ("weight_scale_2", "weight_global_scale")
_INPUT_SCALES = ("input_scale", "input_global_scale")
_E4M3_NAN = 0x7F
Filled = list[tuple[str, Tensor]]


def to_fill(model: Any, model_config: Any) -> Filled:
    """(name, the view without padding) of all floats of NVFP4 layers that a checkpoint has to fill, now NaN.

    Args:
        model: vLLM's, before it is loaded.
        model_config: vLLM's.

    Returns:
        Nothing for a checkpoint that is not in one of fp4cast's layouts.
    """
    activations = _activations(model_config)
    found = [] if activations is None else list(_floats(model, with_inputs=activations == "w4a4"))
    for _, tensor in found:
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(_E4M3_NAN)
        else:
            tensor.fill_(math.nan)
    return found


def check(filled: Filled) -> None:
    """Raise for the first tensor that was not loaded.

    Raises:
        CheckpointError: nothing filled it.
    """
    for name, tensor in filled:
        missing = _nan(tensor)
        if missing.any():
            where = "" if missing.all() else f"{missing.nonzero()[0].tolist()}"
            raise CheckpointError(
                f"{name}{where}: nothing in the checkpoint filled it, or it holds NaN; vLLM would have computed with "
                "what was in memory. Is a shard incomplete? `fp4cast verify SRC DST` says what is missing."
            )


def _activations(model_config: Any) -> str | None:
    """Those of the checkpoint, by its config: vLLM registers input scales for some W4A16 layers, too."""
    config = model_config.hf_config
    for each in (config, getattr(config, "text_config", None)):
        for key in ("quantization_config", "compression_config"):
            section = getattr(each, key, None)
            if section is not None:
                section = section if isinstance(section, dict) else section.to_dict()
                try:
                    return read_claims({key: section}).activations
                except CheckpointError:
                    return None
    return None


def _floats(model: Any, *, with_inputs: bool) -> Iterator[tuple[str, Tensor]]:
    for module_name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not any(name.endswith(_TENSOR_SCALES) for name in parameters):
            continue
        regions = getattr(module, "fp4cast_regions", {})
        for name, parameter in parameters.items():
            read = with_inputs or not name.endswith(_INPUT_SCALES)
            if read and parameter.is_floating_point() and not parameter.is_meta:
                yield f"{module_name}.{name}", regions.get(name, lambda tensor: tensor)(parameter.data)


def _nan(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8) & _E4M3_NAN == _E4M3_NAN
    return tensor.isnan()
