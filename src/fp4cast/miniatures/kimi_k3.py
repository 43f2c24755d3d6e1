"""Kimi-K3: compressed-tensors experts inside a multimodal model, the quantization_config one level down."""

from __future__ import annotations

from fp4cast.formats import Bytes
from fp4cast.miniatures.compressed_tensors import compressed
from fp4cast.miniatures.draft import Draft
from fp4cast.miniatures.parts import add_experts, add_globals


def draft_kimi_k3(draft: Draft) -> None:
    """Two layers of four experts."""
    hidden, inner, experts = 64, 96, 4
    for shard, i in enumerate((1, 2)):
        at = f"language_model.model.layers.{i}"

        def put(e: int, module: str, codes: Bytes, scales: Bytes, shard: int = shard) -> None:
            home = shard ^ (e == 3 and module.endswith("w3"))
            draft.add(home, f"{module}.weight_packed", "U8", codes)
            draft.add(home, f"{module}.weight_scale", "U8", scales)

        add_experts(draft, f"{at}.block_sparse_moe.experts", experts, hidden, inner, put)
        draft.bf16(shard, f"{at}.block_sparse_moe.gate.weight", experts, hidden)
        draft.bf16(shard, f"{at}.block_sparse_moe.shared_experts.gate_proj.weight", inner, hidden)
        draft.bf16(shard, f"{at}.self_attn.q_proj.weight", hidden, hidden)
    draft.bf16(0, "vision_tower.patch_embed.proj.weight", hidden, 3, 4, 4)
    add_globals(draft, hidden, "language_model.")
    ignore = ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*lm_head.*", "re:vision_tower.*", "re:.*\\.gate$"]
    text = {"model_type": "kimi_linear", "hidden_size": hidden, "quantization_config": compressed(ignore)}
    draft.config = {"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "text_config": text}
