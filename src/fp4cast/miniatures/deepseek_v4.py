"""DeepSeek-V4 and V4.1: FP8 weights that are named alike, MTP experts that stay, partners in other shards."""

from __future__ import annotations

from typing import Any

import numpy as np

from fp4cast.formats import Bytes
from fp4cast.miniatures.draft import VOCABULARY, Draft
from fp4cast.miniatures.parts import add_experts


def draft_deepseek_v4(draft: Draft, nested: bool = False) -> None:
    """Two layers of four experts, and an MTP layer; `nested` for V4.1's config and FP8 blocks."""
    hidden, inner, experts, block = 128, 64, 4, 32 if nested else 128

    def put(e: int, module: str, codes: Bytes, scales: Bytes) -> None:
        # Expert 2 has its w3 in the other shard, expert 3 the scales of its w1.
        here = 0 if module.startswith("layers.0.") else 1
        away = (e == 2 and module.endswith("w3"), e == 3 and module.endswith("w1"))
        draft.add(here ^ away[0], f"{module}.weight", "I8", codes)
        draft.add(here ^ (away[0] or away[1]), f"{module}.scale", "F8_E8M0", scales)

    for shard, at in enumerate(("layers.0", "layers.1")):
        add_experts(draft, f"{at}.ffn.experts", experts, hidden, inner, put)
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
    add_experts(draft, "mtp.0.ffn.experts", 2, hidden, inner, put)
    if nested:  # V4.1's one-byte tables are not codes
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


def draft_deepseek_v41(draft: Draft) -> None:
    """V4.1: the text model's config is nested, and tables of one-byte integers are named like codes."""
    draft_deepseek_v4(draft, nested=True)
