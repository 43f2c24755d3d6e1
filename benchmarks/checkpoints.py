"""Checkpoints of true shapes, written as fast as the disk takes them: by name, by size, or sparse.

Codes are random, and every tensor is another rotation of one pool of 64 MB. Scales are distributed like those of
trained models: roughly normal weights in rows of different size, about 10 binades, bytes 111 to 128. No shard is ever
held in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fp4cast.checkpoints.header import DTYPE_BITS, lay_out
from fp4cast.miniatures.compressed_tensors import compressed

POOL_BYTES = {"codes": 64 << 20, "scales": 8 << 20, "dense": 8 << 20}
STEP = 2 * 4_987_003  # from one tensor's rotation to the next; even, so that BF16 stays aligned
SHARD_BYTES = 5e9
REAL_BYTES = 1 << 20  # in a sparse checkpoint, larger tensors are holes


class Spec(NamedTuple):
    """A tensor to be written: `kind` is the pool that its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Draft:
    """A checkpoint to be written.

    Attributes:
        shards: the tensors of each file.
        config: config.json.
        options: what `fp4cast convert` needs for it.
        first: the number of its first file; gpt-oss counts from 0.
    """

    shards: list[list[Spec]]
    config: dict[str, Any]
    options: tuple[str, ...] = ()
    first: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for shard in self.shards for spec in shard)

    @property
    def converted_bytes(self) -> int:
        """About what a conversion writes: every scale twice, and some bytes a tensor."""
        specs = [spec for shard in self.shards for spec in shard]
        return self.nbytes + sum(spec.nbytes for spec in specs if spec.kind == "scales") + 300 * len(specs)


class Pools:
    """Where the bytes of all tensors come from."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        rows = rng.normal(0, 0.8, (POOL_BYTES["scales"] // 128, 1)).astype(np.float32)
        noise = rng.standard_normal((len(rows), 128), np.float32) * np.float32(0.7)
        scales = np.clip(np.rint(120 + rows + noise), 111, 128).astype(np.uint8)
        weights = rng.standard_normal(POOL_BYTES["dense"] // 2, np.float32) * np.float32(0.02)
        self._pools = {
            "codes": memoryview(rng.bytes(POOL_BYTES["codes"])),
            "scales": memoryview(scales.tobytes()),
            "dense": memoryview((weights.view(np.uint32) >> 16).astype("<u2").tobytes()),
        }

    def slices(self, kind: str, number: int, nbytes: int) -> Iterator[memoryview]:
        """`nbytes` of a pool, from a start that is another one for every number."""
        pool = self._pools[kind]
        at = number * STEP % len(pool)
        while nbytes:
            part = pool[at : at + nbytes]
            yield part
            at, nbytes = 0, nbytes - len(part)


def write(path: Path, draft: Draft, sparse: bool = False) -> None:
    """Write a draft's shards, index and config; `sparse` leaves large tensors as holes, which read as zeros."""
    path.mkdir(parents=True)
    pools, last = Pools(), draft.first + len(draft.shards) - 1
    weight_map: dict[str, str] = {}
    number = 0
    for i, specs in enumerate(draft.shards, draft.first):
        file = f"model-{i:05d}-of-{last:05d}.safetensors"
        placed = lay_out(((spec.name, spec.dtype, spec.shape) for spec in specs), {"format": "pt"})
        with (path / file).open("wb") as out:
            out.write(placed.header)
            out.truncate(placed.size)
            for spec in specs:
                number += 1
                weight_map[spec.name] = file
                if sparse and (spec.kind != "dense" or spec.nbytes > REAL_BYTES):
                    continue
                out.seek(placed.offsets[spec.name])
                for part in pools.slices(spec.kind, number, spec.nbytes):
                    out.write(part)
    index = {"metadata": {"total_size": draft.nbytes}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(draft.config, indent=2))


def make(path: Path, case: str, layers: int, gb: float, shard_bytes: float = 0) -> None:
    """Write one of the cases, maybe in other shards; a function of plain arguments, for a process of its own."""
    draft = CASES[case](layers, gb)
    if shard_bytes:
        specs = [spec for shard in draft.shards for spec in shard]
        draft = replace(draft, shards=cut(specs, shard_bytes))
    write(path, draft)


def cut(specs: Sequence[Spec], shard_bytes: float) -> list[list[Spec]]:
    """Consecutive tensors in files of about one size."""
    total = sum(spec.nbytes for spec in specs)
    many = max(1, round(total / shard_bytes))
    shards: list[list[Spec]] = [[] for _ in range(many)]
    done = 0
    for spec in specs:
        shards[min(many - 1, done * many // total)].append(spec)
        done += spec.nbytes
    return [shard for shard in shards if shard]


def dense(name: str, *shape: int) -> Spec:
    return Spec(name, "BF16", shape, "dense")


def gpt_oss(layers: int, _: float) -> Draft:
    """openai/gpt-oss-20b: 13.76 GB in 3 files. Fewer layers take the same part of the vocabulary with them."""
    hidden, vocabulary = 2880, 201088 * layers // 24
    specs = [dense("model.embed_tokens.weight", vocabulary, hidden)]
    for i in range(layers):
        at = f"model.layers.{i}"
        specs += [dense(f"{at}.input_layernorm.weight", hidden), dense(f"{at}.self_attn.sinks", 64)]
        for name, rows, columns in (("q", 4096, hidden), ("k", 512, hidden), ("v", 512, hidden), ("o", hidden, 4096)):
            weight = f"{at}.self_attn.{name}_proj"
            specs += [dense(f"{weight}.weight", rows, columns), dense(f"{weight}.bias", rows)]
        for name, rows in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
            bank = f"{at}.mlp.experts.{name}"
            specs += [
                dense(f"{bank}_bias", 32, rows),
                Spec(f"{bank}_blocks", "U8", (32, rows, 90, 16), "codes"),
                Spec(f"{bank}_scales", "U8", (32, rows, 90), "scales"),
            ]
        specs += [dense(f"{at}.mlp.router.weight", 32, hidden), dense(f"{at}.mlp.router.bias", 32)]
        specs += [dense(f"{at}.post_attention_layernorm.weight", hidden)]
    specs += [dense("lm_head.weight", vocabulary, hidden), dense("model.norm.weight", hidden)]
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "num_local_experts": 32,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "vocab_size": vocabulary,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept},
    }
    return Draft(cut(specs, sum(spec.nbytes for spec in specs) / 3), config, first=0)


def experts(at: Callable[[int], str], many: int, inner: int, hidden: int, names: Sequence[str]) -> list[Spec]:
    """Routed experts w1, w2, w3, each pair's codes before its scales; names: suffix and dtype of codes, of scales."""
    specs: list[Spec] = []
    for e in range(many):
        for leaf, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            module = f"{at(e)}.{leaf}"
            specs += [
                Spec(module + names[0], names[1], (rows, columns // 2), "codes"),
                Spec(module + names[2], names[3], (rows, columns // 32), "scales"),
            ]
    return specs


def _fill(at: Callable[[int], str], gb: float, inner: int, hidden: int, names: Sequence[str]) -> list[Spec]:
    """As many experts as make some gigabytes."""
    one = sum(spec.nbytes for spec in experts(at, 1, inner, hidden, names))
    return experts(at, max(1, round(gb * 1e9 / one)), inner, hidden, names)


def deepseek(_: int, gb: float) -> Draft:
    """Some gigabytes of DeepSeek-V4-Flash's experts, 256 a layer."""
    names = (".weight", "I8", ".scale", "F8_E8M0")
    specs = _fill(lambda e: f"layers.{3 + e // 256}.ffn.experts.{e % 256}", gb, 2048, 4096, names)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    config = {"model_type": "deepseek_v4", "expert_dtype": "fp4", "quantization_config": quantization}
    return Draft(cut(specs, SHARD_BYTES), config, ("--activations", "w4a4", "--input-scales", "1.0"))


KIMI_NAMES = (".weight_packed", "U8", ".weight_scale", "U8")
KIMI_CONFIG = {
    "model_type": "kimi_k3",
    "text_config": {
        "model_type": "kimi_linear",
        "quantization_config": compressed(["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*lm_head.*"]),
    },
}


def kimi_expert(e: int) -> str:
    """Kimi-K3's name of its e-th routed expert, 896 a layer; layer 0 is dense."""
    return f"language_model.model.layers.{1 + e // 896}.block_sparse_moe.experts.{e % 896}"


def kimi(_: int, gb: float) -> Draft:
    """Some gigabytes of Kimi-K3's experts."""
    return Draft(cut(_fill(kimi_expert, gb, 3072, 3584, KIMI_NAMES), SHARD_BYTES), KIMI_CONFIG)


CASES: dict[str, Callable[[int, float], Draft]] = {
    "gpt-oss-20b": gpt_oss,
    "deepseek-v4-flash": deepseek,
    "kimi-k3": kimi,
}
