"""The miniatures' families: names, dtypes, shapes and configs as they are on the hub, only small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fp4cast.formats import Bytes
from fp4cast.miniatures.draft import VOCABULARY, Draft, mxfp4

__all__ = ["MAKERS"]


def _experts(
    draft: Draft, prefix: str, experts: int, hidden: int, inner: int, put: Callable[[int, str, Bytes, Bytes], None]
) -> None:
    """Routed experts w1, w3 [inner, hidden] and w2 [hidden, inner], with w1 and w3 of different spans."""
    for e in range(experts):
        for leaf, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            codes, scales = draft.mxfp4(f"{prefix}.{e}.{leaf}", rows, columns, lower=2 if leaf == "w3" else 0)
            if draft.traps and leaf == "w2" and e == 1:  # byte 0 with codes that are not zero: 2^-127, and legal
                codes, scales = mxfp4(draft.rng, (rows, columns), center=6)
                scales[0, 0] = 0
            put(e, f"{prefix}.{e}.{leaf}", codes.reshape(rows, -1), scales)


def _attention(draft: Draft, shard: int, prefix: str, hidden: int, heads: int, kv: int, head: int, bias: bool) -> None:
    for name, rows, columns in (
        ("q_proj", heads * head, hidden),
        ("k_proj", kv * head, hidden),
        ("v_proj", kv * head, hidden),
        ("o_proj", hidden, heads * head),
    ):
        draft.bf16(shard, f"{prefix}.{name}.weight", rows, columns)
        if bias:
            draft.bf16(shard, f"{prefix}.{name}.bias", rows)


def _gpt_oss(draft: Draft) -> None:
    hidden, inner, experts, layers = 96, 96, 4, 2
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            codes, scales = draft.mxfp4(f"{at}.mlp.experts.{name}", experts, rows, columns)
            draft.add(i, f"{at}.mlp.experts.{name}_blocks", "U8", codes)
            # The scales of the first layer's down_proj lie in the other shard.
            draft.add(1 if name == "down_proj" else i, f"{at}.mlp.experts.{name}_scales", "U8", scales)
            draft.bf16(i, f"{at}.mlp.experts.{name}_bias", experts, rows)
        draft.bf16(i, f"{at}.mlp.router.weight", experts, hidden)
        draft.bf16(i, f"{at}.mlp.router.bias", experts)
        _attention(draft, i, f"{at}.self_attn", hidden, 4, 2, 16, bias=True)
        draft.bf16(i, f"{at}.self_attn.sinks", 4)
        draft.ones(i, f"{at}.input_layernorm.weight", hidden)
        draft.ones(i, f"{at}.post_attention_layernorm.weight", hidden)
    _globals(draft, hidden)
    draft.config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": VOCABULARY,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


def _globals(draft: Draft, hidden: int, prefix: str = "") -> None:
    draft.bf16(0, f"{prefix}model.embed_tokens.weight", VOCABULARY, hidden)
    draft.bf16(1, f"{prefix}lm_head.weight", VOCABULARY, hidden)
    draft.ones(1, f"{prefix}model.norm.weight", hidden)


def _deepseek(draft: Draft, nested: bool = False) -> None:
    hidden, inner, experts, block = 128, 64, 4, 32 if nested else 128

    def put(e: int, module: str, codes: Bytes, scales: Bytes) -> None:
        # Expert 2 has its w3 in the other shard, expert 3 the scales of its w1.
        here = 0 if module.startswith("layers.0.") else 1
        away = (e == 2 and module.endswith("w3"), e == 3 and module.endswith("w1"))
        draft.add(here ^ away[0], f"{module}.weight", "I8", codes)
        draft.add(here ^ (away[0] or away[1]), f"{module}.scale", "F8_E8M0", scales)

    for shard, at in enumerate(("layers.0", "layers.1")):
        _experts(draft, f"{at}.ffn.experts", experts, hidden, inner, put)
        for leaf, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            draft.fp8(shard, f"{at}.ffn.shared_experts.{leaf}", rows, columns, block)
        draft.fp8(shard, f"{at}.attn.wq_a", 64, hidden, block)
        draft.f32(shard, f"{at}.attn.attn_sink", 4)
        draft.f32(shard, f"{at}.hc_attn_base", 3)
        draft.bf16(shard, f"{at}.ffn.gate.weight", experts, hidden)
        draft.ones(shard, f"{at}.ffn_norm.weight", hidden)
    table = draft.rng.integers(0, experts, (VOCABULARY, 2))
    draft.add(0, "layers.0.ffn.gate.tid2eid", "I64", table.astype(np.int64))
    draft.f32(1, "layers.1.ffn.gate.bias", experts)
    _experts(draft, "mtp.0.ffn.experts", 2, hidden, inner, put)
    if nested:  # V4.1's one-byte tables are no codes
        draft.add(1, "layers.1.engram.table.weight", "I8", draft.rng.integers(0, 256, (64, 32)).astype(np.uint8))
    draft.bf16(0, "embed.weight", VOCABULARY, hidden)
    draft.bf16(1, "head.weight", VOCABULARY, hidden)
    quantization: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [block, block],
    }
    text = {"hidden_size": hidden, "moe_intermediate_size": inner, "n_routed_experts": experts, "num_hidden_layers": 2}
    if nested:
        quantization["expert_dtype"] = "fp4"
        draft.config = {"model_type": "deepseek_v41", "text_config": text, "quantization_config": quantization}
    else:
        draft.config = {"model_type": "deepseek_v4", **text, "expert_dtype": "fp4", "quantization_config": quantization}


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


def _kimi_k3(draft: Draft) -> None:
    hidden, inner, experts = 64, 96, 4
    for shard, i in enumerate((1, 2)):
        at = f"language_model.model.layers.{i}"

        def put(e: int, module: str, codes: Bytes, scales: Bytes, shard: int = shard) -> None:
            home = shard ^ (e == 3 and module.endswith("w3"))
            draft.add(home, f"{module}.weight_packed", "U8", codes)
            draft.add(home, f"{module}.weight_scale", "U8", scales)

        _experts(draft, f"{at}.block_sparse_moe.experts", experts, hidden, inner, put)
        draft.bf16(shard, f"{at}.block_sparse_moe.gate.weight", experts, hidden)
        draft.bf16(shard, f"{at}.block_sparse_moe.shared_experts.gate_proj.weight", inner, hidden)
        draft.bf16(shard, f"{at}.self_attn.q_proj.weight", hidden, hidden)
    draft.bf16(0, "vision_tower.patch_embed.proj.weight", hidden, 3, 4, 4)
    _globals(draft, hidden, "language_model.")
    ignore = ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*lm_head.*", "re:vision_tower.*", "re:.*\\.gate$"]
    text = {"model_type": "kimi_linear", "hidden_size": hidden, "quantization_config": compressed(ignore)}
    draft.config = {"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "text_config": text}


def _projections(draft: Draft, shard: int, at: str, shapes: Mapping[str, tuple[int, int]], bias: int = 127) -> None:
    for name, (rows, columns) in shapes.items():
        codes, scales = draft.mxfp4(f"{at}.{name}", rows, columns)
        if bias != 127:
            scales = np.maximum(scales, 127 - bias) - (127 - bias)
        draft.add(shard, f"{at}.{name}.weight_packed", "U8", codes.reshape(rows, -1))
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


def _moe(draft: Draft) -> None:
    for i in range(2):
        at = f"model.layers.{i}"
        for e in range(4):
            _projections(draft, i, f"{at}.mlp.experts.{e}", _MLP)
        draft.bf16(i, f"{at}.mlp.gate.weight", 4, 64)
        _attention(draft, i, f"{at}.self_attn", 64, 4, 2, 16, bias=False)
        for name in ("q_norm", "k_norm"):
            draft.ones(i, f"{at}.self_attn.{name}.weight", 16)
        _norms(draft, i, at)
    _globals(draft, 64)
    draft.config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_LLAMA, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "quantization_config": compressed(["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]),
    }  # fmt: skip


def _dense(draft: Draft, version: str = "0.14.0") -> None:
    bias = 125 if version.startswith("0.13.") else 127
    for i in range(2):
        at = f"model.layers.{i}"
        _projections(draft, i, f"{at}.self_attn", _ATTENTION, bias)
        _projections(draft, i, f"{at}.mlp", _MLP, bias)
        _norms(draft, i, at)
    _globals(draft, 64)
    quantization = compressed(["lm_head"], version)
    draft.config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **_LLAMA, "quantization_config": quantization,
    }  # fmt: skip


MAKERS: dict[str, Callable[[Draft], None]] = {
    "gpt-oss": _gpt_oss,
    "deepseek-v4": _deepseek,
    "deepseek-v4.1": lambda draft: _deepseek(draft, nested=True),
    "kimi-k3": _kimi_k3,
    "moe": _moe,
    "dense": _dense,
    "dense-0.13": lambda draft: _dense(draft, "0.13.0"),
}
