"""Linear layers and experts of compressed-tensors' `mxfp4-pack-quantized`, cast while they are loaded.

Each is vLLM's class for compressed-tensors' NVFP4 (W4A16), with the parameters of its class for MXFP4 until they are
loaded. Read in vLLM 0.26.0 and 0.32.0: quantization/compressed_tensors, `_get_scheme_from_parts` and `get_moe_method`.
"""

from __future__ import annotations

import importlib
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fp4cast.formats import MX_BLOCK
from fp4cast.vllm.experts import subclass
from fp4cast.vllm.filled import empty
from fp4cast.vllm.on_load.cast import cast_loaded, check_loaded

_ROOM = "vllm.model_executor.layers.quantization.compressed_tensors"
_SCHEMES, _EXPERTS = f"{_ROOM}.schemes.compressed_tensors_", f"{_ROOM}.compressed_tensors_moe.compressed_tensors_moe_"
_parameter = partial(torch.nn.Parameter, requires_grad=False)


def can_cast(config: dict[str, Any]) -> bool:
    """Whether a checkpoint's quantization config says MXFP4 weights, and activations that W4A16 serves as well."""
    groups = config.get("config_groups")
    if config.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
        return False
    formats = {(group or {}).get("format") or config.get("format") for group in groups.values()}
    inputs = [(group or {}).get("input_activations") for group in groups.values()]
    return formats == {"mxfp4-pack-quantized"} and all(each is None or each.get("num_bits") == 4 for each in inputs)


@cache
def config_class() -> Any:
    """The config of such a checkpoint."""
    theirs = importlib.import_module(f"{_ROOM}.compressed_tensors").CompressedTensorsConfig
    theirs._get_scheme_from_parts, _classes(), _experts_classes()  # all of it has to be there
    return subclass("CastCompressedConfig", CompressedConfig, theirs)


@cache
def _classes() -> tuple[Any, Any]:
    """The schemes of linear layers: vLLM's for MXFP4, and ours on that for NVFP4."""
    mxfp4 = importlib.import_module(f"{_SCHEMES}w4a4_mxfp4").CompressedTensorsW4A4Mxfp4
    nvfp4 = importlib.import_module(f"{_SCHEMES}w4a4_nvfp4").CompressedTensorsW4A4Fp4
    return mxfp4, subclass("CastLinearScheme", CastLinear, nvfp4)


@cache
def _experts_classes() -> tuple[Any, Any]:
    """The methods of experts: vLLM's for MXFP4, and ours on that for NVFP4."""
    mxfp4 = importlib.import_module(f"{_EXPERTS}w4a4_mxfp4").CompressedTensorsW4A4Mxfp4MoEMethod
    nvfp4 = importlib.import_module(f"{_EXPERTS}w4a4_nvfp4").CompressedTensorsW4A4Nvfp4MoEMethod
    return mxfp4, subclass("CastCompressedExpertsMethod", CastExperts, nvfp4)


class CompressedConfig:
    """What is other than in vLLM's `CompressedTensorsConfig`: MXFP4 gets our classes."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Our method for MXFP4 experts, vLLM's for all else."""
        parent: Any = super()
        method = parent.get_quant_method(layer, prefix)
        mxfp4, ours = _experts_classes()
        return ours(layer.moe_config, layer_name=prefix, use_a16=True) if isinstance(method, mxfp4) else method

    def _get_scheme_from_parts(self, weight_quant: Any, *args: Any, **named: Any) -> Any:
        """Our scheme for MXFP4 weights, whose kernel vLLM would choose in the constructor of its own."""
        parent: Any = super()
        if parent._is_mxfp4(weight_quant):
            return _classes()[1](use_a16=True)
        return parent._get_scheme_from_parts(weight_quant, *args, **named)


class _FromMxfp4:
    """Marks what has to be loaded of a layer that vLLM's class for MXFP4 sets up."""

    group_size: int

    def __init__(self, *args: Any, **named: Any) -> None:
        parent: Any = super()
        parent.__init__(*args, **named)
        self.group_size = MX_BLOCK  # what vLLM's `create_weights` for MXFP4 asks for

    def _create(self, theirs: Any, layer: Any, *sizes: Any, **named: Any) -> None:
        theirs.create_weights(self, layer, *sizes, **named)
        for name, parameter in layer.named_parameters(recurse=False):
            if name.endswith(("weight_packed", "weight_scale")):
                empty(parameter.data)  # 0xFF is NaN for an E8M0 scale


class CastLinear(_FromMxfp4):
    """A linear layer; the projections that vLLM merges are one scale domain."""

    def create_weights(self, layer: Any, *sizes: Any, **named: Any) -> None:
        """Register vLLM's MXFP4 parameters."""
        self._create(_classes()[0], layer, *sizes, **named)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Cast, then let vLLM prepare the layer as NVFP4."""
        name = getattr(layer, "prefix", "a linear layer")
        codes, scales = layer.weight_packed.data, layer.weight_scale.data
        for part, rows in zip(codes.split(layer.logical_widths), scales.split(layer.logical_widths), strict=True):
            check_loaded(name, weight=part, weight_scale=rows)
        made = cast_loaded(name, codes, scales)
        layer.weight_scale = _parameter(made.block_scales)
        layer.weight_global_scale = _parameter(made.tensor_scale.float().reciprocal().repeat(len(layer.logical_widths)))
        parent: Any = super()
        parent.process_weights_after_loading(layer)


class CastExperts(_FromMxfp4):
    """Experts; gate and up of an expert are one scale domain, down another."""

    def create_weights(self, layer: Any, *sizes: Any, **named: Any) -> None:
        """Register vLLM's MXFP4 parameters."""
        self._create(_experts_classes()[0], layer, *sizes, **named)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Cast each expert, then let vLLM prepare the layer as NVFP4."""
        for held in ("w13", "w2"):
            codes, scales = getattr(layer, f"{held}_weight_packed").data, getattr(layer, f"{held}_weight_scale").data
            block_scales, tensor_scales = _cast_each(f"{layer.layer_name}.{held}", codes, scales)
            shards = (len(codes), 2) if held == "w13" and layer.moe_config.is_act_and_mul else (len(codes),)
            divisors = tensor_scales.reciprocal().reshape(-1, *(1,) * (len(shards) - 1)).expand(shards).contiguous()
            setattr(layer, f"{held}_weight_scale", _parameter(block_scales))
            setattr(layer, f"{held}_weight_global_scale", _parameter(divisors))
            setattr(layer, f"{held}_input_global_scale", _parameter(torch.ones_like(divisors)))  # W4A16 reads none
        parent: Any = super()
        parent.process_weights_after_loading(layer)


def _cast_each(name: str, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 [E, N, K/16], float32 tensor scales [E]) of experts' codes [E, N, K/2] and scales [E, N, K/32]."""
    halves = 2 if name.endswith("w13") else 1
    for half, part in zip(codes.chunk(halves, 1), scales.chunk(halves, 1), strict=True):
        check_loaded(name, weight=half, weight_scale=part)
    made = [cast_loaded(f"{name}[{expert}]", *each) for expert, each in enumerate(zip(codes, scales, strict=True))]
    return torch.stack([each.block_scales for each in made]), torch.stack([each.tensor_scale.float() for each in made])
