"""gpt-oss: banks of experts, scales in another shard, decoys of other formats beside them."""

from __future__ import annotations

from fp4cast.miniatures.draft import VOCABULARY, Draft
from fp4cast.miniatures.parts import add_attention, add_globals


def draft_gpt_oss(draft: Draft) -> None:
    """Two layers of four experts."""
    hidden, inner, experts, layers = 96, 96, 4, 2
    draft.first_shard, draft.decoys = 0, ("original/model.safetensors", "metal/model.bin")
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
        add_attention(draft, i, f"{at}.self_attn", hidden, 4, 2, 16, bias=True)
        draft.bf16(i, f"{at}.self_attn.sinks", 4)
        draft.ones(i, f"{at}.input_layernorm.weight", hidden)
        draft.ones(i, f"{at}.post_attention_layernorm.weight", hidden)
    add_globals(draft, hidden)
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
