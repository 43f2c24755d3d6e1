"""Random models to serve: each as an MXFP4 source, its NVFP4 casts, and the BF16 twin that they are compared with.

They are large enough for the kernels of an engine, and nothing else: weights that are exact in BF16, biases of a size
that shows when one is lost, and either all experts for every token, which no rounding can reroute, or a few.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fp4cast
from fp4cast.formats import mxfp4_values
from fp4cast.miniatures import mxfp4, write_checkpoint
from fp4cast.miniatures.compressed_tensors import compressed

VOCABULARY = 512
Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, tuple[str, Array]]


@dataclass
class Pair:
    """A source and its twin under construction."""

    rng: np.random.Generator
    center: int
    source: Tensors = field(default_factory=dict)
    twin: Tensors = field(default_factory=dict)

    def plain(self, name: str, *shape: int, scale: float = 0.02) -> None:
        """A BF16 tensor that both have; `scale` 0 gives zeros."""
        self.both(name, bf16(self.rng.standard_normal(shape) * scale))

    def both(self, name: str, bits: Array) -> None:
        """BF16 bits that both have."""
        self.source[name] = self.twin[name] = ("BF16", bits)

    def ones(self, name: str, size: int) -> None:
        """A norm."""
        self.both(name, bf16(np.ones(size)))

    def projection(self, module: str, rows: int, columns: int) -> None:
        """One MXFP4 projection as compressed-tensors writes it."""
        codes, scales = mxfp4(self.rng, (rows, columns), self.center)
        self.source |= {f"{module}.weight_packed": ("U8", codes.reshape(rows, -1))}
        self.source |= {f"{module}.weight_scale": ("U8", scales)}
        self.twin[f"{module}.weight"] = ("BF16", bf16(mxfp4_values(codes.reshape(rows, -1), scales)))

    def bank(self, module: str, experts: int, rows: int, columns: int) -> None:
        """A bank of experts as openai writes it."""
        codes, scales = mxfp4(self.rng, (experts, rows, columns), self.center)
        self.source |= {f"{module}_blocks": ("U8", codes), f"{module}_scales": ("U8", scales)}
        values = [bf16(mxfp4_values(c.reshape(rows, -1), s)).T for c, s in zip(codes, scales, strict=True)]
        self.twin[module] = ("BF16", np.stack(values))

    def attention(self, at: str, hidden: int, heads: int, kv: int, head: int, *, cast: bool, bias: bool) -> None:
        """Attention, in MXFP4 or in BF16."""
        shapes = {"q": (heads * head, hidden), "k": (kv * head, hidden), "v": (kv * head, hidden)}
        for name, shape in (shapes | {"o": (hidden, heads * head)}).items():
            if cast:
                self.projection(f"{at}.{name}_proj", *shape)
            else:
                self.plain(f"{at}.{name}_proj.weight", *shape)
            if bias:
                self.plain(f"{at}.{name}_proj.bias", shape[0])

    def ends(self, hidden: int) -> None:
        """Embeddings, head and the last norm."""
        self.plain("model.embed_tokens.weight", VOCABULARY, hidden, scale=0.5)
        self.plain("lm_head.weight", VOCABULARY, hidden, scale=1.5 * hidden**-0.5)
        self.ones("model.norm.weight", hidden)


def bf16(values: Array) -> Array:
    """The bits of BF16 numbers, rounded towards zero: exact for MXFP4's values."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32).__rshift__(16).astype(np.uint16)


def llama(pair: Pair) -> dict[str, Any]:
    for i in range(2):
        at = f"model.layers.{i}"
        pair.attention(f"{at}.self_attn", 256, 4, 2, 64, cast=True, bias=False)
        for name, shape in (("gate", (512, 256)), ("up", (512, 256)), ("down", (256, 512))):
            pair.projection(f"{at}.mlp.{name}_proj", *shape)
        pair.ones(f"{at}.input_layernorm.weight", 256)
        pair.ones(f"{at}.post_attention_layernorm.weight", 256)
    pair.ends(256)
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **_COMMON, "intermediate_size": 512,
        "quantization_config": compressed(["lm_head"]),
    }  # fmt: skip


def qwen3_moe(pair: Pair) -> dict[str, Any]:
    for i in range(2):
        at = f"model.layers.{i}"
        for expert in range(8):
            for name, shape in (("gate", (256, 256)), ("up", (256, 256)), ("down", (256, 256))):
                pair.projection(f"{at}.mlp.experts.{expert}.{name}_proj", *shape)
        pair.plain(f"{at}.mlp.gate.weight", 8, 256, scale=0.1)
        pair.attention(f"{at}.self_attn", 256, 4, 2, 64, cast=False, bias=False)
        for name, size in (("self_attn.q_norm", 64), ("self_attn.k_norm", 64)):
            pair.ones(f"{at}.{name}.weight", size)
        pair.ones(f"{at}.input_layernorm.weight", 256)
        pair.ones(f"{at}.post_attention_layernorm.weight", 256)
    pair.ends(256)
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_COMMON, "intermediate_size": 512,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True,
        "quantization_config": compressed(["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]),
    }  # fmt: skip


def gpt_oss(
    hidden: int, layers: int, experts: int, used: int, heads: int, kv: int, gate_up: float = 0.5, down: float = 0.5
) -> Callable[[Pair], dict[str, Any]]:
    """A gpt-oss whose biases have the standard deviations `gate_up` and `down`."""

    def fill(pair: Pair) -> dict[str, Any]:
        for i in range(layers):
            at = f"model.layers.{i}"
            pair.bank(f"{at}.mlp.experts.gate_up_proj", experts, 2 * hidden, hidden)
            pair.bank(f"{at}.mlp.experts.down_proj", experts, hidden, hidden)
            pair.plain(f"{at}.mlp.experts.gate_up_proj_bias", experts, 2 * hidden, scale=gate_up)
            pair.plain(f"{at}.mlp.experts.down_proj_bias", experts, hidden, scale=down)
            pair.plain(f"{at}.mlp.router.weight", experts, hidden, scale=hidden**-0.5)
            pair.plain(f"{at}.mlp.router.bias", experts)
            pair.attention(f"{at}.self_attn", hidden, heads, kv, 64, cast=False, bias=True)
            pair.plain(f"{at}.self_attn.sinks", heads, scale=1.0)
            pair.ones(f"{at}.input_layernorm.weight", hidden)
            pair.ones(f"{at}.post_attention_layernorm.weight", hidden)
        pair.ends(hidden)
        sizes = {
            "hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": layers, "head_dim": 64,
            "num_attention_heads": heads, "num_key_value_heads": kv, "num_local_experts": experts,
            "num_experts_per_tok": used, "experts_per_token": used,
        }  # fmt: skip
        kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
        return _GPT_OSS | sizes | {"layer_types": kinds}

    return fill


_COMMON = {
    "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "head_dim": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY, "attention_bias": True, "hidden_act": "silu", "swiglu_limit": 7.0, "rms_norm_eps": 1e-5,
    "sliding_window": 128, "max_position_embeddings": 131072, "initial_context_length": 4096, "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False, "router_aux_loss_coef": 0.9, "output_router_logits": False, "use_cache": True,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 0,
    "quantization_config": {
        "modules_to_not_convert":
            ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        "quant_method": "mxfp4",
    },
}  # fmt: skip
_SMALL = {"hidden": 256, "layers": 2, "experts": 4, "used": 4, "heads": 4, "kv": 2}
MODELS: dict[str, tuple[Callable[[Pair], dict[str, Any]], int, tuple[str, ...]]] = {
    # name: (what fills it, the most frequent scale byte, layouts)
    "llama": (llama, 120, ("modelopt", "compressed-tensors")),
    "qwen3-moe": (qwen3_moe, 120, ("modelopt", "compressed-tensors")),
    "gpt-oss-256": (gpt_oss(**_SMALL), 120, ("modelopt",)),
    "gpt-oss-256-routed": (gpt_oss(256, 4, 8, 2, 4, 2), 120, ("modelopt",)),
    "gpt-oss-20b-routed": (gpt_oss(2880, 2, 32, 4, 64, 8), 118, ("modelopt",)),
    "gpt-oss-2880": (gpt_oss(2880, 2, 4, 4, 64, 8), 118, ("modelopt",)),
}
DIAGNOSES = {
    "gpt-oss-256-no-bias": (gpt_oss(**_SMALL, gate_up=0, down=0), 120, ("modelopt",)),
    "gpt-oss-256-gate-up-bias": (gpt_oss(**_SMALL, down=0), 120, ("modelopt",)),
    "gpt-oss-256-down-bias": (gpt_oss(**_SMALL, gate_up=0), 120, ("modelopt",)),
}


def make(name: str, path: Path, keep: bool = False) -> dict[str, Path]:
    """Make a model's checkpoints; by variant: "bf16", "mxfp4", and one for each cast. `keep` takes what is there."""
    made = path / "made.json"
    if keep and made.exists():
        return {label: path / folder for label, folder in json.loads(made.read_text()).items()}
    if path.exists():  # of an earlier run
        shutil.rmtree(path)
    fill, center, layouts = (MODELS | DIAGNOSES)[name]
    pair = Pair(np.random.default_rng(0), center)
    config = fill(pair)
    found = {"bf16": path / "bf16", "mxfp4": path / "mxfp4"}
    write_checkpoint(found["mxfp4"], {"model-00001-of-00001.safetensors": pair.source}, config)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    write_checkpoint(found["bf16"], {"model-00001-of-00001.safetensors": pair.twin}, plain)
    for layout in layouts:
        found[layout] = cast(found["mxfp4"], path / layout, layout=layout)
    w4a4 = {"activations": "w4a4", "input_scales": 1.0}
    found["modelopt, W4A4"] = cast(found["mxfp4"], path / "modelopt-w4a4", **w4a4)
    made.write_text(json.dumps({label: each.name for label, each in found.items()}))
    return found


def cast(source: Path, destination: Path, **options: Any) -> Path:
    """Convert, and stop where the result is not exact."""
    report = fp4cast.convert(source, destination, **options)
    if not report.exact:
        raise SystemExit(f"{destination}: the cast is not exact: {json.dumps(report.to_json())[:500]}")
    return destination
