"""Faithful small checkpoints of every family: real names, dtypes, configs and shard splits, and the known traps.

Used by `fp4cast demo`, the tests and the benchmarks. All are exact; each plants, in a few blocks, what real files hold
and naive casts get wrong: codes of -0, blocks of zeros with scale bytes 0, 126 and far outside of the window, a spread
of 18 that a shift saves, scale byte 0 with non-zero codes, pairs and fused projections split across shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fp4cast import shards
from fp4cast.formats import Bytes

__all__ = ["KINDS", "make", "mxfp4", "write_checkpoint"]

VOCABULARY = 256
CENTER = 121  # the most frequent scale byte
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Draft:
    """A checkpoint that is being made up.

    Attributes:
        rng: where all numbers come from.
        traps: plant the traps.
        files: by shard, by name: (dtype, array).
        config: config.json.
    """

    rng: np.random.Generator
    traps: bool
    files: list[dict[str, tuple[str, Array]]] = field(default_factory=lambda: [{}, {}])
    config: dict[str, Any] = field(default_factory=dict)

    def add(self, shard: int, name: str, dtype: str, array: Array) -> None:
        """Put a tensor into a shard."""
        self.files[shard][name] = (dtype, np.ascontiguousarray(array))

    def bf16(self, shard: int, name: str, *shape: int, scale: float = 0.02) -> None:
        """Random BF16 weights."""
        values = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        self.add(shard, name, "BF16", (values.view(np.uint32) >> 16).astype(np.uint16))

    def ones(self, shard: int, name: str, *shape: int) -> None:
        """BF16 ones, for norms."""
        self.add(shard, name, "BF16", np.full(shape, 0x3F80, np.uint16))

    def f32(self, shard: int, name: str, *shape: int) -> None:
        """Random FP32 weights."""
        self.add(shard, name, "F32", self.rng.standard_normal(shape).astype(np.float32))

    def fp8(self, shard: int, module: str, rows: int, columns: int, block: int) -> None:
        """FP8 weights with E8M0 block scales, named like the MXFP4 ones."""
        codes = self.rng.integers(0, 0x7F, (rows, columns)).astype(np.uint8)
        self.add(shard, f"{module}.weight", "F8_E4M3", codes)
        grid = (-(-rows // block), -(-columns // block))
        self.add(shard, f"{module}.scale", "F8_E8M0", np.full(grid, 118, np.uint8))

    def mxfp4(self, *shape: int, center: int = CENTER) -> tuple[Bytes, Bytes]:
        """(codes [.., K/32, 16], scales [.., K/32]) for shape [.., N, K], with the traps."""
        codes, scales = mxfp4(self.rng, shape, center)
        if self.traps:
            _plant(codes.reshape(-1, 16), scales.reshape(-1), reaches_top=center == CENTER)
        return codes, scales


def mxfp4(rng: np.random.Generator, shape: tuple[int, ...], center: int = CENTER) -> tuple[Bytes, Bytes]:
    """Random MXFP4 weights with codes and exponents distributed like those of trained models.

    Args:
        rng: the source of randomness.
        shape: [.., N, K] of the weights.
        center: the most frequent scale byte.

    Returns:
        Packed codes uint8 [.., N, K/32, 16] and E8M0 scales uint8 [.., N, K/32] that span about 10 binades.
    """
    blocks = (*shape[:-1], shape[-1] // 32)
    codes = rng.integers(0, 256, (*blocks, 16), np.uint8)
    scales = np.clip(np.rint(rng.normal(center, 1.2, blocks)), center - 6, center + 4).astype(np.uint8)
    return codes, scales


def _plant(codes: Bytes, scales: Bytes, *, reaches_top: bool) -> None:
    """Traps in the first and the last blocks of a tensor: codes [n, 16], scales [n]."""
    if reaches_top:
        scales[0] = CENTER + 4
    codes[-1], scales[-1] = 0x00, 0  # how ModelOpt and GGUF write a block of zeros
    codes[-2], scales[-2] = 0x88, 126  # how auto-round does, with -0
    codes[-3], scales[-3] = 0x80, 200  # an exponent that would zero the whole tensor if it counted
    codes[-4], scales[-4] = (
        0x75,
        CENTER - 14,
    )  # 18 below the top; magnitudes {3, 6}: exact one binade below the window, by a shift
    codes[-5, ::2] = 0x08  # -0 beside values


def _experts(
    draft: Draft, prefix: str, experts: int, hidden: int, inner: int, put: Callable[[int, str, Bytes, Bytes], None]
) -> None:
    """Routed experts w1, w3 [inner, hidden] and w2 [hidden, inner], with w1 and w3 of different spans."""
    for e in range(experts):
        for leaf, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            tiny = draft.traps and leaf == "w2" and e == 1
            codes, scales = draft.mxfp4(rows, columns, center=CENTER if leaf != "w3" else 119)
            if tiny:  # byte 0 with codes that are not zero: 2^-127, and legal
                codes, scales = mxfp4(draft.rng, (rows, columns), center=6)
                scales[0, 0] = 0
            put(e, f"{prefix}.{e}.{leaf}", codes.reshape(rows, -1), scales)


def _attention(draft: Draft, shard: int, prefix: str, hidden: int, heads: int, kv: int, head: int, bias: bool) -> None:
    for name, rows, columns in (
        ("q_proj", heads * head, hidden),
        ("k_proj", kv * head, hidden),
        ("v_proj", kv * head, hidden),
        ("o_proj", hidden, heads * head),
    ):
        draft.bf16(shard, f"{prefix}.{name}.weight", rows, columns)
        if bias:
            draft.bf16(shard, f"{prefix}.{name}.bias", rows)


def _gpt_oss(draft: Draft) -> None:
    hidden, inner, experts, layers = 96, 96, 4, 2
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            codes, scales = draft.mxfp4(experts, rows, columns)
            draft.add(i, f"{at}.mlp.experts.{name}_blocks", "U8", codes)
            # The scales of the first layer's down_proj lie in the other shard.
            draft.add(1 if name == "down_proj" else i, f"{at}.mlp.experts.{name}_scales", "U8", scales)
            draft.bf16(i, f"{at}.mlp.experts.{name}_bias", experts, rows)
        draft.bf16(i, f"{at}.mlp.router.weight", experts, hidden)
        draft.bf16(i, f"{at}.mlp.router.bias", experts)
        _attention(draft, i, f"{at}.self_attn", hidden, 4, 2, 16, bias=True)
        draft.bf16(i, f"{at}.self_attn.sinks", 4)
        draft.ones(i, f"{at}.input_layernorm.weight", hidden)
        draft.ones(i, f"{at}.post_attention_layernorm.weight", hidden)
    _globals(draft, hidden)
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


def _globals(draft: Draft, hidden: int, prefix: str = "") -> None:
    draft.bf16(0, f"{prefix}model.embed_tokens.weight", VOCABULARY, hidden)
    draft.bf16(1, f"{prefix}lm_head.weight", VOCABULARY, hidden)
    draft.ones(1, f"{prefix}model.norm.weight", hidden)


def _deepseek(draft: Draft, nested: bool = False) -> None:
    hidden, inner, experts, block = 128, 64, 4, 32 if nested else 128

    def put(e: int, module: str, codes: Bytes, scales: Bytes) -> None:
        # Expert 2 has its w3 in the other shard, expert 3 the scales of its w1.
        here = 0 if module.startswith("layers.0.") else 1
        away = (e == 2 and module.endswith("w3"), e == 3 and module.endswith("w1"))
        draft.add(here ^ away[0], f"{module}.weight", "I8", codes)
        draft.add(here ^ (away[0] or away[1]), f"{module}.scale", "F8_E8M0", scales)

    for shard, at in enumerate(("layers.0", "layers.1")):
        _experts(draft, f"{at}.ffn.experts", experts, hidden, inner, put)
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
    _experts(draft, "mtp.0.ffn.experts", 2, hidden, inner, put)
    if nested:  # V4.1's one-byte tables are no codes
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


def _compressed(ignore: list[str], version: str = "0.14.0") -> dict[str, Any]:
    weights = {
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
        "dynamic": False, "scale_dtype": "torch.uint8",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "version": version,
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": weights}},
        "ignore": ignore,
    }


def _kimi_k3(draft: Draft) -> None:
    hidden, inner, experts = 64, 96, 4
    for shard, i in enumerate((1, 2)):
        at = f"language_model.model.layers.{i}"

        def put(e: int, module: str, codes: Bytes, scales: Bytes, shard: int = shard) -> None:
            home = shard ^ (e == 3 and module.endswith("w3"))
            draft.add(home, f"{module}.weight_packed", "U8", codes)
            draft.add(home, f"{module}.weight_scale", "U8", scales)

        _experts(draft, f"{at}.block_sparse_moe.experts", experts, hidden, inner, put)
        draft.bf16(shard, f"{at}.block_sparse_moe.gate.weight", experts, hidden)
        draft.bf16(shard, f"{at}.block_sparse_moe.shared_experts.gate_proj.weight", inner, hidden)
        draft.bf16(shard, f"{at}.self_attn.q_proj.weight", hidden, hidden)
    draft.bf16(0, "vision_tower.patch_embed.proj.weight", hidden, 3, 4, 4)
    _globals(draft, hidden, "language_model.")
    ignore = ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*lm_head.*", "re:vision_tower.*", "re:.*\\.gate$"]
    text = {"model_type": "kimi_linear", "hidden_size": hidden, "quantization_config": _compressed(ignore)}
    draft.config = {"architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "text_config": text}


def _projections(draft: Draft, shard: int, at: str, shapes: Mapping[str, tuple[int, int]], bias: int = 127) -> None:
    for name, (rows, columns) in shapes.items():
        codes, scales = draft.mxfp4(rows, columns)
        if bias != 127:
            scales = np.maximum(scales, 127 - bias) - (127 - bias)
        draft.add(shard, f"{at}.{name}.weight_packed", "U8", codes.reshape(rows, -1))
        draft.add(shard, f"{at}.{name}.weight_scale", "U8", scales)


_LLAMA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
_ATTENTION = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
_MLP = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}


def _norms(draft: Draft, shard: int, at: str) -> None:
    draft.ones(shard, f"{at}.input_layernorm.weight", 64)
    draft.ones(shard, f"{at}.post_attention_layernorm.weight", 64)


def _moe(draft: Draft) -> None:
    for i in range(2):
        at = f"model.layers.{i}"
        for e in range(4):
            _projections(draft, i, f"{at}.mlp.experts.{e}", _MLP)
        draft.bf16(i, f"{at}.mlp.gate.weight", 4, 64)
        _attention(draft, i, f"{at}.self_attn", 64, 4, 2, 16, bias=False)
        for name in ("q_norm", "k_norm"):
            draft.ones(i, f"{at}.self_attn.{name}.weight", 16)
        _norms(draft, i, at)
    _globals(draft, 64)
    draft.config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_LLAMA, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "quantization_config": _compressed(["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]),
    }  # fmt: skip


def _dense(draft: Draft, version: str = "0.14.0") -> None:
    bias = 125 if version.startswith("0.13.") else 127
    for i in range(2):
        at = f"model.layers.{i}"
        _projections(draft, i, f"{at}.self_attn", _ATTENTION, bias)
        _projections(draft, i, f"{at}.mlp", _MLP, bias)
        _norms(draft, i, at)
    _globals(draft, 64)
    quantization = _compressed(["lm_head"], version)
    draft.config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **_LLAMA, "quantization_config": quantization,
    }  # fmt: skip


_MAKERS: dict[str, Callable[[Draft], None]] = {
    "gpt-oss": _gpt_oss,
    "deepseek-v4": _deepseek,
    "deepseek-v4.1": lambda draft: _deepseek(draft, nested=True),
    "kimi-k3": _kimi_k3,
    "moe": _moe,
    "dense": _dense,
    "dense-0.13": lambda draft: _dense(draft, "0.13.0"),
}
KINDS = tuple(_MAKERS)


def make(kind: str, path: Path, *, seed: int = 0, traps: bool = True) -> Path:
    """Write a small checkpoint.

    Args:
        kind: one of `KINDS`.
        path: the directory to make.
        seed: of all its numbers.
        traps: plant the traps; without them all half-blocks of all tensors stay verbatim.

    Returns:
        `path`.
    """
    draft = Draft(np.random.default_rng(seed), traps)
    _MAKERS[kind](draft)
    first = 0 if kind == "gpt-oss" else 1  # gpt-oss numbers its shards from 0
    names = [f"model-{first + i:05d}-of-{len(draft.files):05d}.safetensors" for i in range(len(draft.files))]
    write_checkpoint(path, dict(zip(names, draft.files, strict=True)), draft.config)
    (path / "generation_config.json").write_text('{"do_sample": true}\n')
    (path / "LICENSE").write_text("A licence that has to travel with the weights.\n")
    (path / "encoding").mkdir()
    (path / "encoding" / "tokens.py").write_text("TOKENS = 256\n")
    if kind == "gpt-oss":
        for decoy in ("original/model.safetensors", "metal/model.bin"):
            (path / decoy).parent.mkdir()
            (path / decoy).write_bytes(b"another format of the same weights")
    return path


def write_checkpoint(
    path: Path, files: Mapping[str, Mapping[str, tuple[str, Array]]], config: Mapping[str, Any]
) -> None:
    """Write safetensors shards, their index and config.json.

    Args:
        path: the directory to make.
        files: by file name, by tensor name: (safetensors dtype, array of the stored bits).
        config: config.json.
    """
    path.mkdir(parents=True)
    for file, tensors in files.items():
        placed = shards.layout(((n, dtype, array.shape) for n, (dtype, array) in tensors.items()), {"format": "pt"})
        with (path / file).open("wb") as out:
            out.write(placed.header)
            for name in sorted(tensors, key=lambda n: placed.offsets[n]):
                out.write(tensors[name][1].tobytes())
    index = {
        "metadata": {"total_size": sum(a.nbytes for tensors in files.values() for _, a in tensors.values())},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (path / "config.json").write_text(json.dumps(config, indent=2))
