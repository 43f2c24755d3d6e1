"""gpt-oss's banks of experts, cast while they are loaded."""

from __future__ import annotations

import importlib
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fp4cast.formats import MX_BLOCK
from fp4cast.vllm.banks import Part, filled_region
from fp4cast.vllm.experts import BiasedExperts, subclass
from fp4cast.vllm.filled import empty
from fp4cast.vllm.on_load.cast import cast_loaded, check_loaded

_LAYERS = "vllm.model_executor.layers"
_PACKED = {"weight": 2, "weight_scale": MX_BLOCK, "bias": 1}  # elements along K that one entry holds


class BanksConfig:
    """What is other than in vLLM's `GptOssMxfp4Config` (model_executor/layers/quantization/mxfp4.py).

    Its name stays "gpt_oss_mxfp4": vLLM's loader of experts asks for it.
    """

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Our method for experts, vLLM's for all else."""
        experts = importlib.import_module(f"{_LAYERS}.fused_moe").RoutedExperts
        if not isinstance(layer, experts):
            parent: Any = super()
            return parent.get_quant_method(layer, prefix)
        modelopt = importlib.import_module(f"{_LAYERS}.quantization.modelopt")
        nvfp4 = modelopt.ModelOptNvFp4Config("W4A16_NVFP4", True, None, [])
        return _method_class()(quant_config=nvfp4, moe_config=layer.moe_config)


@cache
def _method_class() -> type:
    modelopt = importlib.import_module(f"{_LAYERS}.quantization.modelopt")
    return subclass("CastExpertsMethod", CastExperts, modelopt.ModelOptNvFp4FusedMoE)


class CastExperts(BiasedExperts):
    """Experts whose parameters are MXFP4 until they are loaded, and NVFP4 from then on."""

    def create_weights(self, layer: Any, *sizes: Any, **named: Any) -> None:
        """Register vLLM's MXFP4 parameters, and mark what has to be loaded."""
        mxfp4 = importlib.import_module(f"{_LAYERS}.quantization.mxfp4")
        mxfp4.GptOssMxfp4MoEMethod.create_weights(self, layer, *sizes, **named)
        layer.fp4cast_regions = {
            f"{held}_{name}": partial(_region, layer=layer, held=held, packed=packed)
            for held in ("w13", "w2")
            for name, packed in _PACKED.items()
        }
        for held in ("w13", "w2"):
            for name in _PACKED:  # 0xFF is NaN for an E8M0 scale
                empty(_view(layer, held, name))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Cast, then prepare as NVFP4 experts with biases."""
        for held in ("w13", "w2"):
            _cast(layer, held)
            layer.register_parameter(f"{held}_input_scale", None)
        super().process_weights_after_loading(layer)


def _region(parameter: Tensor, layer: Any, held: str, packed: int) -> Tensor:
    """What the checkpoint fills of a layer's MXFP4 parameter."""
    return filled_region(parameter, packed == 1, packed, Part.of(layer, held == "w13", MX_BLOCK))


def _view(layer: Any, held: str, name: str) -> Tensor:
    found: Tensor = layer.fp4cast_regions[f"{held}_{name}"](getattr(layer, f"{held}_{name}").data)
    return found


def _cast(layer: Any, held: str) -> None:
    """Replace one MXFP4 bank by an NVFP4 one, as one scale domain; padding stays zero."""
    name = f"{layer.layer_name}.{held}"
    codes, scales = _view(layer, held, "weight"), _view(layer, held, "weight_scale")
    check_loaded(name, weight=codes, weight_scale=scales, bias=_view(layer, held, "bias"))
    made = cast_loaded(name, codes, scales)
    weight = getattr(layer, f"{held}_weight")
    block_scales = torch.zeros(*weight.shape[:2], weight.shape[2] // 8, dtype=torch.uint8, device=weight.device)
    rows, columns = made.block_scales.shape[1:]
    block_scales[:, :rows, :columns] = made.block_scales.view(torch.uint8)
    shards = (len(weight), 2) if held == "w13" else (len(weight),)
    parameter = partial(torch.nn.Parameter, requires_grad=False)
    setattr(layer, f"{held}_weight_scale", parameter(block_scales.view(torch.float8_e4m3fn)))
    setattr(layer, f"{held}_weight_scale_2", parameter(made.tensor_scale.float().expand(shards).contiguous()))
