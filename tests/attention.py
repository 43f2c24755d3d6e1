"""Checkpoints whose attention can become FP8: Kimi-K3's both kinds, with the real names, small and ragged sizes."""

import json

import numpy as np

from fp4cast.checkpoints.header import read_header
from fp4cast.miniatures.compressed_tensors import compressed
from fp4cast.miniatures.draft import VOCABULARY, Draft, write_checkpoint
from fp4cast.miniatures.kimi_k3 import draft_kimi_k3
from fp4cast.miniatures.parts import add_globals

LAYER = "language_model.model.layers.{}.self_attn."
# Two heads of 128 where Kimi-K3 has 96: `b_proj` ends within a block of 128 rows, as in the real model.
KDA = {
    "q_proj": (256, 256), "k_proj": (256, 256), "v_proj": (256, 256), "g_proj": (256, 256), "f_a_proj": (128, 256),
    "b_proj": (2, 256), "f_b_proj": (256, 128), "o_proj": (256, 256),
}  # fmt: skip
# A latent of 128 + 64: `kv_a_proj_with_mqa` ends within a block, too, and `g_proj` follows it.
MLA = {
    "q_a_proj": (128, 256), "kv_a_proj_with_mqa": (192, 256), "g_proj": (256, 256), "q_b_proj": (384, 128),
    "kv_b_proj": (500, 128), "o_proj": (256, 256),
}  # fmt: skip
MERGED_BADLY = ("q_a_proj", "kv_a_proj_with_mqa", "g_proj")
KDA_FP8 = [LAYER.format(1) + name for name in KDA]
MLA_FP8 = [LAYER.format(2) + name for name in MLA if name not in MERGED_BADLY]


def kimi_k3(path, traps=True, widest=500):
    """A Kimi-K3 with a KDA layer and an MLA layer; traps: a block of zeros, of minus zeros, and of tiny numbers."""
    draft = Draft(np.random.default_rng(0), True)
    draft_kimi_k3(draft)
    for tensors in draft.files:
        for name in [name for name in tensors if ".self_attn." in name]:
            del tensors[name]
    for layer, shapes in ((1, KDA), (2, MLA)):
        at = LAYER.format(layer)
        for number, (name, shape) in enumerate(shapes.items()):
            draft.bf16(number % 2, f"{at}{name}.weight", *(min(size, widest) for size in shape))
        for name in ("q_conv1d", "k_conv1d", "v_conv1d") if layer == 1 else ():
            draft.bf16(0, f"{at}{name}.weight", 256, 1, 4)
        draft.ones(0, f"{at}o_norm.weight", 128)
    if traps:
        bits = draft.files[0][f"{LAYER.format(1)}q_proj.weight"][1]
        bits[:128, :128] = 0
        bits[:128, 128:] = 0x8000
        bits[128:, :128] = 0x0001
        bits[128:, 128:][bits[128:, 128:] > 0x7FFF] &= 0x807F  # subnormal negative ones beside others
    return written(path, draft)


def qwen3_moe(path, key_value_rows=128):
    """A Qwen3-MoE of two layers and two experts, with heads of 64 and a hidden size of 128."""
    draft, hidden, inner = Draft(np.random.default_rng(1), False), 128, 64
    for i in range(2):
        at = f"model.layers.{i}"
        for e in range(2):
            for name, rows, columns in (
                ("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner),
            ):  # fmt: skip
                module = f"{at}.mlp.experts.{e}.{name}"
                codes, scales = draft.mxfp4(module, rows, columns)
                draft.add(i, f"{module}.weight_packed", "U8", codes.reshape(rows, -1))
                draft.add(i, f"{module}.weight_scale", "U8", scales)
        draft.bf16(i, f"{at}.mlp.gate.weight", 2, hidden)
        for name, rows, columns in (
            ("q_proj", 256, hidden), ("k_proj", key_value_rows, hidden), ("v_proj", key_value_rows, hidden),
            ("o_proj", hidden, 256),
        ):  # fmt: skip
            draft.bf16(i, f"{at}.self_attn.{name}.weight", rows, columns)
        for name in ("q_norm", "k_norm"):
            draft.ones(i, f"{at}.self_attn.{name}.weight", 64)
        for name in ("input_layernorm", "post_attention_layernorm"):
            draft.ones(i, f"{at}.{name}.weight", hidden)
    add_globals(draft, hidden)
    draft.config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden, "head_dim": 64,
        "intermediate_size": inner, "moe_intermediate_size": inner, "num_hidden_layers": 2, "vocab_size": VOCABULARY,
        "num_attention_heads": 4, "num_key_value_heads": key_value_rows // 64, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "num_experts": 2, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "quantization_config": compressed(["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]),
    }  # fmt: skip
    return written(path, draft)


def written(path, draft):
    names = [f"model-{i + 1:05d}-of-{len(draft.files):05d}.safetensors" for i in range(len(draft.files))]
    write_checkpoint(path, dict(zip(names, draft.files, strict=True)), draft.config)
    (path / "LICENSE").write_text("A licence that has to travel with the weights.\n")
    return path


def index_anew(path):
    """After tensors were added by hand."""
    shards = [read_header(file) for file in sorted(path.glob("*.safetensors"))]
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())
    names = {name: shard.path.name for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
