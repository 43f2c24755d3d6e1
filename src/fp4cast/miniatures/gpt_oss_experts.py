"""gpt-oss as llm-compressor saves it: single experts, gate and up apart, each with its bias."""

from __future__ import annotations

from fp4cast.miniatures.compressed_tensors import compressed
from fp4cast.miniatures.draft import Draft
from fp4cast.miniatures.gpt_oss import draft_gpt_oss


def draft_gpt_oss_experts(draft: Draft) -> None:
    """Two layers of four experts; expert 3 has its up_proj in the other shard."""
    draft_gpt_oss(draft)
    draft.first_shard, draft.decoys = 1, ()
    for tensors in draft.files:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
    for layer in range(2):
        for expert in range(4):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                home = layer ^ (expert == 3 and leaf == "up_proj")
                codes, scales = draft.mxfp4(module, 96, 96)
                draft.add(home, f"{module}.weight_packed", "U8", codes.reshape(96, -1))
                draft.add(home, f"{module}.weight_scale", "U8", scales)
                draft.bf16(home, f"{module}.bias", 96)
    draft.config["quantization_config"] = compressed(["lm_head", "re:.*self_attn.*", "re:.*router$"])
