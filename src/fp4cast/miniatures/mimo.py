"""MiMo-V2.6: experts whose scales lack the `_inv` of their FP8 neighbours', and lie in another shard."""

from __future__ import annotations

from fp4cast.formats import Bytes
from fp4cast.miniatures.draft import VOCABULARY, Draft
from fp4cast.miniatures.parts import add_experts, add_globals

_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def add_mixed_layer(draft: Draft, shard: int, at: str, attention: str, dtype: str, scales_as: str) -> None:
    """Four MXFP4 experts, FP8 attention, a router; expert 3 has the scales of its gate_proj in the other shard."""
    hidden, inner, experts = 128, 64, 4

    def put(e: int, module: str, codes: Bytes, scales: Bytes) -> None:
        parent, _, leaf = module.rpartition(".")
        name = f"{parent}.{_LEAVES[leaf]}"
        draft.add(shard, f"{name}.weight", dtype, codes)
        draft.add(shard ^ (e == 3 and leaf == "w1"), f"{name}{scales_as}", "U8", scales)

    add_experts(draft, f"{at}.mlp.experts", experts, hidden, inner, put)
    draft.fp8(shard, f"{at}.{attention}", hidden, hidden, 128, scales_as=".weight_scale_inv", dtype="F32")
    draft.bf16(shard, f"{at}.mlp.gate.weight", experts, hidden)
    draft.ones(shard, f"{at}.input_layernorm.weight", hidden)


def draft_mimo(draft: Draft) -> None:
    """Two layers of experts after a dense one, and a draft model in FP8."""
    for shard, at in enumerate(("model.layers.1", "model.layers.2")):
        add_mixed_layer(draft, shard, at, "self_attn.qkv_proj", "U8", ".weight_scale")
    for at in ("model.layers.0.mlp", "model.mtp.layers.0.mlp"):
        for leaf, rows, columns in (("gate_proj", 64, 128), ("up_proj", 64, 128), ("down_proj", 128, 64)):
            draft.fp8(0, f"{at}.{leaf}", rows, columns, 128, scales_as=".weight_scale_inv", dtype="F32")
    add_globals(draft, 128)
    draft.config = {
        "architectures": ["MiMoV2ForCausalLM"], "model_type": "mimo_v2", "hidden_size": 128, "num_hidden_layers": 3,
        "moe_intermediate_size": 64, "n_routed_experts": 4, "vocab_size": VOCABULARY,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "mxfp4_block_size": 32, "quant_method": "fp8",
            "store_dtype": "mxfp4", "weight_block_size": [128, 128],
        },
    }  # fmt: skip
