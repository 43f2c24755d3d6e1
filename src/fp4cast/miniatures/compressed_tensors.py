"""compressed-tensors: a mixture of experts, a dense model, and its twin with the wrong exponent bias of 0.13."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fp4cast.formats import E8M0_BIAS
from fp4cast.miniatures.draft import VOCABULARY, Draft
from fp4cast.miniatures.parts import add_attention, add_globals


def compressed(ignore: list[str], version: str = "0.14.0") -> dict[str, Any]:
    """The quantization_config of compressed-tensors' mxfp4-pack-quantized."""
    weights = {
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
        "dynamic": False, "scale_dtype": "torch.uint8",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "version": version,
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": weights}},
        "ignore": ignore,
    }


def _projections(
    draft: Draft, shard: int, at: str, shapes: Mapping[str, tuple[int, int]], codes_as: str, bias: int = E8M0_BIAS
) -> None:
    for name, (rows, columns) in shapes.items():
        codes, scales = draft.mxfp4(f"{at}.{name}", rows, columns)
        if bias != E8M0_BIAS:
            scales = np.maximum(scales, E8M0_BIAS - bias) - (E8M0_BIAS - bias)
        draft.add(shard, f"{at}.{name}{codes_as}", "U8", codes.reshape(rows, -1))
        draft.add(shard, f"{at}.{name}.weight_scale", "U8", scales)


_LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
_ATTENTION = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
_MLP = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}


def _norms(draft: Draft, shard: int, at: str) -> None:
    draft.ones(shard, f"{at}.input_layernorm.weight", 64)
    draft.ones(shard, f"{at}.post_attention_layernorm.weight", 64)


def add_moe(draft: Draft, codes_as: str) -> None:
    """A Qwen3-MoE of two layers and four experts, without its quantization_config."""
    for i in range(2):
        at = f"model.layers.{i}"
        for e in range(4):
            _projections(draft, i, f"{at}.mlp.experts.{e}", _MLP, codes_as)
        draft.bf16(i, f"{at}.mlp.gate.weight", 4, 64)
        add_attention(draft, i, f"{at}.self_attn", 64, 4, 2, 16, bias=False)
        for name in ("q_norm", "k_norm"):
            draft.ones(i, f"{at}.self_attn.{name}.weight", 16)
        _norms(draft, i, at)
    add_globals(draft, 64)
    draft.config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_LLAMA, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


def add_dense(draft: Draft, codes_as: str, bias: int = E8M0_BIAS) -> None:
    """A Llama of two layers, without its quantization_config."""
    for i in range(2):
        at = f"model.layers.{i}"
        _projections(draft, i, f"{at}.self_attn", _ATTENTION, codes_as, bias)
        _projections(draft, i, f"{at}.mlp", _MLP, codes_as, bias)
        _norms(draft, i, at)
    add_globals(draft, 64)
    draft.config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_LLAMA}


def draft_moe(draft: Draft) -> None:
    """A Qwen3-MoE of two layers and four experts."""
    add_moe(draft, ".weight_packed")
    draft.config["quantization_config"] = compressed(["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"])


def draft_dense(draft: Draft, version: str = "0.14.0") -> None:
    """A Llama of two layers, as a version of compressed-tensors writes it."""
    add_dense(draft, ".weight_packed", E8M0_BIAS - 2 if version.startswith("0.13.") else E8M0_BIAS)
    draft.config["quantization_config"] = compressed(["lm_head"], version)


def draft_dense_013(draft: Draft) -> None:
    """Like `draft_dense`, with scale bytes that are two too low."""
    draft_dense(draft, "0.13.0")
