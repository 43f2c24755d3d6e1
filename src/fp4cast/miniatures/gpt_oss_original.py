"""gpt-oss as OpenAI's own code reads it: other names, q, k and v in one matrix, another config."""

from __future__ import annotations

import numpy as np

from fp4cast.miniatures.draft import VOCABULARY, Draft
from fp4cast.miniatures.gpt_oss import draft_gpt_oss

_NAMES = (
    ("model.layers.", "block."),
    ("model.embed_tokens.weight", "embedding.weight"),
    ("lm_head.weight", "unembedding.weight"),
    ("model.norm.weight", "norm.scale"),
    ("input_layernorm.weight", "attn.norm.scale"),
    ("post_attention_layernorm.weight", "mlp.norm.scale"),
    ("self_attn.o_proj.", "attn.out."),
    ("self_attn.", "attn."),
    ("mlp.router.", "mlp.gate."),
    ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
    ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
    ("mlp.experts.gate_up_proj_", "mlp.mlp1_weight."),
    ("mlp.experts.down_proj_", "mlp.mlp2_weight."),
)


def draft_gpt_oss_original(draft: Draft) -> None:
    """The weights of the miniature of the Hub's layout."""
    draft_gpt_oss(draft)
    draft.first_shard, draft.decoys, draft.stem = 1, (), "model--"
    heads = {key: draft.config[key] for key in ("head_dim", "num_attention_heads", "num_key_value_heads")}
    for i, tensors in enumerate(draft.files):
        for layer in range(2):
            for leaf in ("weight", "bias"):
                parts = [f"model.layers.{layer}.self_attn.{name}_proj.{leaf}" for name in "qkv"]
                if parts[0] in tensors:
                    rows = [tensors.pop(part)[1] for part in parts]
                    tensors[f"block.{layer}.attn.qkv.{leaf}"] = ("BF16", np.concatenate(rows))
        draft.files[i] = {_renamed(name): tensor for name, tensor in tensors.items()}
    dtypes = {"BF16": "BF16", "blocks": "FP4", "scales": "UE8"}
    draft.documents["dtypes.json"] = {
        name: dtypes[dtype if dtype == "BF16" else name.rpartition(".")[2]]
        for tensors in draft.files
        for name, (dtype, _) in tensors.items()
    }
    draft.config = {
        "num_hidden_layers": 2, "num_experts": 4, "experts_per_token": 2, "vocab_size": VOCABULARY, "hidden_size": 96,
        "intermediate_size": 96, "swiglu_limit": 7.0, **heads, "sliding_window": 128, "initial_context_length": 4096,
        "rope_theta": 150000, "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }  # fmt: skip


def _renamed(name: str) -> str:
    for there, here in _NAMES:
        name = name.replace(there, here)
    return name
