"""gpt-oss in OpenAI's own layout (the folder `original/`), seen under the names of the Hub's: a view, not a family.

Only names differ, and q, k and v are one matrix; blocks, scales and the interleaved rows of gate and up are the same
bytes. Read in openai/gpt-oss at 7b58334: gpt_oss/torch/weights.py and model.py (`ModelConfig`, `AttentionBlock`), and
in huggingface/transformers at 08b031b: models/gpt_oss/convert_gpt_oss_weights_to_hf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fp4cast.checkpoints.directory import CONFIG, Checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.errors import CheckpointError, ShapeError, UnsupportedError
from fp4cast.families.views import renamed

_GLOBAL = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
_BLOCK = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
    "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}
_NAME = re.compile(r"block\.(\d+)\.(.+)")
_KEPT = (
    "num_hidden_layers", "experts_per_token", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit",
    "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window", "initial_context_length", "rope_theta",
)  # fmt: skip
_LARGEST = 1 << 40  # no number of a model is as large
_TRANSLATED = ("num_experts", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta")


def as_on_the_hub(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint in OpenAI's layout under the Hub's names and with the Hub's config; any other as it is.

    Raises:
        UnsupportedError: a tensor has a name that gpt-oss has not.
        CheckpointError: the config lacks a number, or the size of a tensor does not follow from it.
    """
    if not any(name.endswith(".mlp.mlp1_weight.blocks") for name in checkpoint.tensors):
        return checkpoint
    config = _Numbers(checkpoint)
    shards = {file: renamed(shard, lambda tensor: _views(tensor, config)) for file, shard in checkpoint.shards.items()}
    return replace(checkpoint, config=_config(config), shards=shards, renamed=True)


class _Numbers:
    """OpenAI's config.json, whose numbers are needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path, self.said = checkpoint.path / CONFIG, checkpoint.config
        self.tensors = len(checkpoint.tensors)

    def __getitem__(self, key: str) -> int | float:
        found = self.said.get(key)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= _LARGEST:
            raise CheckpointError(f"{self.path}: {key} is {str(found)[:100]!r}, expected a number, as OpenAI writes it")
        return found

    @property
    def layers(self) -> int:
        """How many layers, each of which has tensors."""
        found = int(self["num_hidden_layers"])
        if found > self.tensors:
            raise CheckpointError(f"{self.path}: num_hidden_layers is {found}, but there are {self.tensors} tensors")
        return found

    def rows(self, heads: str) -> int:
        """The rows of the projections of so many heads."""
        return int(self[heads] * self["head_dim"])


def _views(tensor: Tensor, config: _Numbers) -> Iterator[Tensor]:
    """A tensor under its name on the Hub; three, of one that holds q, k and v."""
    block = _NAME.fullmatch(tensor.name)
    if block and block[2] in ("attn.qkv.weight", "attn.qkv.bias"):
        yield from _split(tensor, f"model.layers.{block[1]}.self_attn", block[2].rpartition(".")[2], config)
        return
    name = _BLOCK.get(block[2]) if block else _GLOBAL.get(tensor.name)
    if name is None:
        raise UnsupportedError(f"{tensor.path}: {tensor}: expected a tensor of gpt-oss as OpenAI names them")
    yield tensor._replace(name=f"model.layers.{block[1]}.{name}" if block else name)


def _split(tensor: Tensor, attention: str, leaf: str, config: _Numbers) -> Iterator[Tensor]:
    rows = {"q": config.rows("num_attention_heads"), **dict.fromkeys("kv", config.rows("num_key_value_heads"))}
    if tensor.shape[:1] != (sum(rows.values()),) or not tensor.nbytes:
        raise ShapeError(f"{tensor.path}: {tensor}: expected {sum(rows.values())} rows, of {rows}, by {config.path}")
    start, width = tensor.start, tensor.nbytes // tensor.shape[0]
    for projection, count in rows.items():
        name, shape = f"{attention}.{projection}_proj.{leaf}", (count, *tensor.shape[1:])
        yield tensor._replace(name=name, shape=shape, start=start, nbytes=count * width)
        start += count * width


def _config(config: _Numbers) -> Mapping[str, Any]:
    """The Hub's config.json, without a quantization_config."""
    length, factor = config["initial_context_length"], config["rope_scaling_factor"]
    others = {key: value for key, value in config.said.items() if key not in _TRANSLATED}
    return {
        **others,
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "hidden_act": "silu",
        "layer_types": [("sliding", "full")[i % 2] + "_attention" for i in range(config.layers)],
        "max_position_embeddings": math.ceil(length * factor),
        "model_type": "gpt_oss",
        "num_experts_per_tok": config["experts_per_token"],
        "num_local_experts": config["num_experts"],
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": float(config["rope_ntk_beta"]),
            "beta_slow": float(config["rope_ntk_alpha"]),
            "factor": float(factor),
            "original_max_position_embeddings": length,
            "rope_type": "yarn",
            "truncate": False,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **{key: config[key] for key in _KEPT},
    }
