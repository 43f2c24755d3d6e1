"""NVFP4 experts with biases and gpt-oss's activation, as a subclass of vLLM's method for NVFP4 experts.

vLLM's Marlin kernel computes them; only the preparation around it drops the biases. This module adds them: registered,
padded as vLLM's MXFP4 path pads (oracle/mxfp4.py, `mxfp4_round_up_hidden_size_and_intermediate_size`), permuted as
it permutes, and carried by the kernel's config.
"""

from __future__ import annotations

import importlib
import logging
import math
import types
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp4cast.errors import UsageError
from fp4cast.vllm import banks, gpt_oss

HIDDEN_TILE, INNER_TILE = 256, 128  # of Marlin, as vLLM rounds for MXFP4 experts
ALPHA, BETA, LIMIT = 1.702, 1.0, 7.0  # of SwiGLU-OAI, which vLLM's kernels have built in
_MODELS = "vllm.model_executor.models.gpt_oss"


class Choice:
    """Stands where vLLM expects the class of NVFP4 experts' method: one class for experts with biases, or vLLM's."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __call__(self, quant_config: Any, moe_config: Any) -> Any:
        """The method of a layer."""
        if not moe_config.has_bias or _vllm_does_it():
            return self.theirs(quant_config=quant_config, moe_config=moe_config)
        gpt_oss.take_banks(importlib.import_module(_MODELS).GptOssForCausalLM, BiasedExperts)
        return biased(self.theirs)(quant_config=quant_config, moe_config=moe_config)


@cache
def _vllm_does_it() -> bool:
    """Whether this vLLM maps the names of ModelOpt's scales itself, which it drops where it knows no biases."""
    mapper = importlib.import_module(_MODELS).GptOssForCausalLM.hf_to_vllm_mapper
    done = ".gate_up_proj_weight_scale" in mapper.orig_to_new_suffix
    if done:
        logging.getLogger("vllm.fp4cast").info("fp4cast steps back: this vLLM loads NVFP4 gpt-oss itself")
    return done


@cache
def biased(theirs: type) -> type:
    """The subclass of a class of vLLM's; its name says ModelOpt, since vLLM's loader looks there."""
    return subclass("ModelOptNvFp4BiasedMoE", BiasedExperts, theirs)


def subclass(name: str, ours: type, theirs: type) -> type:
    """A class of vLLM's, extended by one of ours, which vLLM need not be there to define."""
    return types.new_class(name, (ours, theirs), exec_body=lambda body: body.update(__module__=ours.__module__))


class BiasedExperts:
    """What NVFP4 experts with biases do otherwise than `ModelOptNvFp4FusedMoE`, which follows it in the class."""

    supports_eplb = False  # biases would have to move with their experts
    nvfp4_backend: Any
    moe_quant_config: Any
    moe: Any

    def __init__(self, quant_config: Any, moe_config: Any) -> None:
        if moe_config.moe_backend not in ("auto", "marlin"):
            raise UsageError(
                f"moe_backend {moe_config.moe_backend!r} drops the biases of NVFP4 experts; expected 'marlin' or 'auto'"
            )
        moe_config.moe_backend = "marlin"
        parent: Any = super()
        parent.__init__(quant_config=quant_config, moe_config=moe_config)

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        """Both sizes as the kernel's tiles need them."""
        parent: Any = super()
        hidden, inner = parent.maybe_roundup_sizes(hidden_size, intermediate_size_per_partition, *args, **kwargs)
        return _round_up(hidden, HIDDEN_TILE), _round_up(inner, INNER_TILE)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Register vLLM's parameters and the biases, with zeros where nothing is loaded."""
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "params_dtype": params_dtype}
        parent: Any = super()
        parent.create_weights(
            layer=layer, intermediate_size_per_partition=intermediate_size_per_partition, **sizes, **attributes
        )
        for name, width in (("w13_bias", 2 * intermediate_size_per_partition), ("w2_bias", hidden_size)):
            bias = torch.nn.Parameter(torch.zeros(num_experts, width, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, bias)
            bias.weight_loader = attributes.get("weight_loader")  # type: ignore[attr-defined]
        for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
            getattr(layer, name).data.view(torch.uint8).zero_()
        layer.fp4cast_regions = banks.filled_regions(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Let vLLM prepare the weights for its kernel, then prepare the biases where they lie."""
        parent: Any = super()
        parent.process_weights_after_loading(layer)
        if self.nvfp4_backend.value == "MARLIN":
            layer.w13_bias.data.copy_(marlin_biases(layer.w13_bias.data))
            layer.w2_bias.data.copy_(marlin_biases(divide(layer.w2_bias.data, layer.w2_weight_scale_2.data)))

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """The scales and biases for the kernel: as vLLM's own function has it for Marlin, with biases."""
        config = importlib.import_module("vllm.model_executor.layers.fused_moe.config").FusedMoEQuantConfig
        return config.make(
            weight_dtype="nvfp4",
            w1_scale=layer.w13_weight_scale,
            w2_scale=layer.w2_weight_scale,
            g1_alphas=layer.w13_weight_scale_2,
            g2_alphas=layer.w2_weight_scale_2,
            w1_bias=layer.w13_bias,
            w2_bias=layer.w2_bias,
            gemm1_alpha=ALPHA,
            gemm1_beta=BETA,
            gemm1_clamp_limit=LIMIT,
        )


def divide(bias: Tensor, tensor_scale: Tensor) -> Tensor:
    """The biases of w2 [E, N] as Marlin takes them, divided by its tensor scales [E].

    With `mul_topk_weights` the kernel adds the bias to a product that lacks the tensor scale, which is folded into the
    router's weight and multiplies their sum (csrc/moe/marlin_moe_wna16/marlin_template.h, `write_result`).
    """
    return (bias.float() / tensor_scale.float()[:, None]).to(bias.dtype)


def marlin_biases(biases: Tensor) -> Tensor:
    """Biases [E, N] in the order of Marlin's output tiles."""
    utilities = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    return torch.stack([utilities.marlin_permute_bias(bias) for bias in biases])


def _round_up(size: int, tile: int) -> int:
    return math.ceil(size / tile) * tile
