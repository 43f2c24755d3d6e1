"""Ling-3.0: experts whose scales are named like those of their FP8 neighbours, and a draft model in the last layer."""

from __future__ import annotations

from fp4cast.miniatures.draft import VOCABULARY, Draft
from fp4cast.miniatures.mimo import add_mixed_layer
from fp4cast.miniatures.parts import add_globals


def draft_ling(draft: Draft) -> None:
    """A layer of four experts, and the draft model's."""
    for shard, at in enumerate(("model.layers.0", "model.layers.1")):
        add_mixed_layer(draft, shard, at, "attention.dense", "I8", ".weight_scale_inv")
        for leaf, rows, columns in (("gate_proj", 64, 128), ("up_proj", 64, 128), ("down_proj", 128, 64)):
            module = f"{at}.mlp.shared_experts.{leaf}"
            draft.fp8(shard, module, rows, columns, 128, scales_as=".weight_scale_inv", dtype="F32")
        draft.f32(shard, f"{at}.mlp.gate.expert_bias", 4)
    add_globals(draft, 128)
    draft.config = {
        "architectures": ["BailingMoeV3ForCausalLM"], "model_type": "bailing_hybrid", "hidden_size": 128,
        "num_hidden_layers": 1, "num_nextn_predict_layers": 1, "moe_intermediate_size": 64, "num_experts": 4,
        "vocab_size": VOCABULARY,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"],
            "quant_method": "fp8", "routed_experts_group_size": 32, "routed_experts_quant_method": "mxfp4",
            "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
        },
    }  # fmt: skip
