"""Cast while loading: `vllm serve openai/gpt-oss-20b --quantization fp4cast` reads MXFP4 and computes in NVFP4.

vLLM's own MXFP4 loader fills MXFP4 parameters; before the kernel's preparation they are cast on their device, by the
tight rule. Codes stay where no half-block needs a shift, and no file is written. What cannot be exact is refused.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fp4cast.casting.tight_rule import MARLIN_BINADES
from fp4cast.errors import CheckpointError, InexactError, UsageError
from fp4cast.formats import E8M0_NAN, MX_BLOCK
from fp4cast.torch import Cast, cast
from fp4cast.vllm.banks import Part, filled_region
from fp4cast.vllm.experts import BiasedExperts, subclass
from fp4cast.vllm.filled import empty, is_empty

NAME = "fp4cast"
_LAYERS = "vllm.model_executor.layers"
_PACKED = {"weight": 2, "weight_scale": MX_BLOCK, "bias": 1}  # elements along K that one entry holds
_LOG = logging.getLogger("vllm.fp4cast")


def register_method() -> None:
    """Add `--quantization fp4cast` through vLLM's own registry; harmless when repeated."""
    quantization = importlib.import_module(f"{_LAYERS}.quantization")
    if NAME not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(NAME)(config_class())


@cache
def config_class() -> type:
    """The class of `--quantization fp4cast`."""
    mxfp4 = importlib.import_module(f"{_LAYERS}.quantization.mxfp4")
    return subclass("Fp4castConfig", CastConfig, mxfp4.GptOssMxfp4Config)


class CastConfig:
    """What is other than in vLLM's `GptOssMxfp4Config` (model_executor/layers/quantization/mxfp4.py).

    Its name stays "gpt_oss_mxfp4": vLLM's loader of experts asks for it.
    """

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take the checkpoint where the user asked for it; raise where it is no MXFP4 gpt-oss."""
        if user_quant != NAME:
            return None
        method, kind = (hf_quant_cfg or {}).get("quant_method"), getattr(hf_config, "model_type", None)
        if kind != "gpt_oss" or method not in ("mxfp4", "gpt_oss_mxfp4"):
            raise UsageError(
                f"--quantization {NAME} casts MXFP4 gpt-oss while it is loaded; this is {kind!r} with quant_method "
                f"{method!r}. `fp4cast convert` casts other families; serve its result without --quantization."
            )
        return NAME

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
    codes, scales = _view(layer, held, "weight"), _view(layer, held, "weight_scale").contiguous()
    lost = {"weight": is_empty(codes), "weight_scale": scales == E8M0_NAN, "bias": is_empty(_view(layer, held, "bias"))}
    for leaf, where in lost.items():
        if bool(where.any()):
            raise CheckpointError(f"{name}_{leaf}: nothing in the checkpoint filled it, or it holds NaN")
    try:
        made = cast(codes, scales)
    except InexactError as error:
        advice = "serve what `fp4cast convert --inexact nearest` writes, or the MXFP4 checkpoint as it is"
        raise InexactError(f"{name}: {str(error).partition(';')[0]}; {advice}") from error
    if made.codes is not codes:
        codes.copy_(made.codes)
        _LOG.info("fp4cast: %s: codes of %d half-blocks were shifted, exactly", name, made.shifted)
    _warn_of_marlin(name, made)
    weight = getattr(layer, f"{held}_weight")
    block_scales = torch.zeros(*weight.shape[:2], weight.shape[2] // 8, dtype=torch.uint8, device=weight.device)
    rows, columns = made.block_scales.shape[1:]
    block_scales[:, :rows, :columns] = made.block_scales.view(torch.uint8)
    shards = (len(weight), 2) if held == "w13" else (len(weight),)
    parameter = partial(torch.nn.Parameter, requires_grad=False)
    setattr(layer, f"{held}_weight_scale", parameter(block_scales.view(torch.float8_e4m3fn)))
    setattr(layer, f"{held}_weight_scale_2", parameter(made.tensor_scale.float().expand(shards).contiguous()))


def _warn_of_marlin(name: str, made: Cast) -> None:
    """Say where Marlin's window is narrower than NVFP4's: it zeroes small block scales."""
    scales = made.block_scales.view(torch.uint8)
    top = scales.max().view(torch.float8_e4m3fn).float()
    small = made.block_scales.float() < top * 2.0**-MARLIN_BINADES
    if bool(small.any()):
        used = (made.codes & 0x77).reshape(*small.shape, 8).any(-1)
        if lost := int((small & used).sum()):
            _LOG.warning(
                "fp4cast: %s: the cast is exact, but vLLM's Marlin kernel zeroes %d half-blocks more than %d binades "
                "below the largest scale", name, lost, MARLIN_BINADES,
            )  # fmt: skip
