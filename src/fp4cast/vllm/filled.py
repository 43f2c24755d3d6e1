"""Whether the checkpoint filled all parameters of the NVFP4 layers: engines lose scales and biases silently.

Before loading, floats are filled with NaN and codes with bytes of 0xFF; a float that still is NaN after it, and a
projection with no other byte, was not loaded. This serves every layer with NVFP4's two scales, whatever its method and
model, of checkpoints in the layouts that fp4cast writes.
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
_NO_CODES = 0xFF  # all of a projection -6: no weights are like that
Filled = list[tuple[str, Tensor]]


def to_fill(model: Any, model_config: Any) -> Filled:
    """(name, the view without padding) of all that a checkpoint has to fill of NVFP4 layers, which is emptied.

    Args:
        model: vLLM's, before it is loaded.
        model_config: vLLM's.

    Returns:
        Nothing for a checkpoint that is not in one of fp4cast's layouts.
    """
    activations = _activations(model_config)
    found = [] if activations is None else list(_views(model, with_inputs=activations == "w4a4"))
    for _, tensor in found:
        empty(tensor)
    return found


def empty(tensor: Tensor) -> None:
    """Fill with what no loader leaves."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(_E4M3_NAN)
    else:
        tensor.fill_(_NO_CODES if tensor.dtype == torch.uint8 else math.nan)


def check(filled: Filled) -> None:
    """Raise for the first tensor that was not loaded.

    Raises:
        CheckpointError: nothing filled it.
    """
    for name, tensor in filled:
        missing = is_empty(tensor)
        if missing.any():
            where = "" if missing.all() else f"{missing.nonzero()[0].tolist()}"
            raise CheckpointError(
                f"{name}{where}: nothing in the checkpoint filled it, or it holds NaN; vLLM would have computed with "
                "what was in memory. Is a shard incomplete? `fp4cast verify SRC DST` says what is missing."
            )


def check_cache(model: Any) -> None:
    """Raise for an attention of which one scale of its KV cache was loaded and one was not: vLLM takes one for both.

    Raises:
        CheckpointError: there is one. Where both are missing, vLLM takes 1, as `fp8_cast` means it.
    """
    for name, module in model.named_modules():
        scales = {each: getattr(module, each, None) for each in ("k_scale", "v_scale")}
        lost = [each for each, scale in scales.items() if isinstance(scale, Tensor) and bool((scale < 0).any())]
        if len(lost) == 1:
            raise CheckpointError(
                f"{name}.{lost[0]}: nothing in the checkpoint filled it, but the other scale of this cache is there; "
                "vLLM would have taken that. Is a shard incomplete? `fp4cast verify SRC DST` says what is missing."
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


def _views(model: Any, *, with_inputs: bool) -> Iterator[tuple[str, Tensor]]:
    for module_name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not any(name.endswith(_TENSOR_SCALES) for name in parameters):
            continue
        regions = getattr(module, "fp4cast_regions", {})
        for name, parameter in parameters.items():
            read = with_inputs or not name.endswith(_INPUT_SCALES)
            if not read or parameter.is_meta or not parameter.numel():
                continue
            view = regions.get(name, lambda tensor: tensor)(parameter.data)
            if parameter.is_floating_point():
                yield f"{module_name}.{name}", view
            elif parameter.dtype == torch.uint8:
                for part in _projections(module, name, view):
                    yield f"{module_name}.{name}", part


def _projections(module: Any, name: str, codes: Tensor) -> Iterator[Tensor]:
    """The codes of each projection of a layer that merges several."""
    sizes = getattr(module, "output_partition_sizes", [])
    if codes.ndim == 3:
        yield from codes.chunk(2 if name.startswith("w13") else 1, dim=1)
    else:
        yield from torch.split(codes, sizes if sum(sizes) == len(codes) else len(codes))


def is_empty(tensor: Tensor) -> Tensor:
    """What is as `empty` leaves it: by value for floats, by projection for codes [N, K/2] and [E, N, K/2]."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8) & _E4M3_NAN == _E4M3_NAN
    if tensor.dtype != torch.uint8:
        return tensor.isnan()
    found = (tensor[..., :1, :] == _NO_CODES).flatten(-2).all(-1)  # by the first row, since a layer may be large
    for place in found.nonzero().tolist():
        found[tuple(place)] = bool((tensor[tuple(place)] == _NO_CODES).all())
    return found
