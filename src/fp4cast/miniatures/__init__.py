"""Small checkpoints of every family, one file a family: real names, dtypes, configs and shards, and the known traps.

Knows how families look, but not what is made of them. Used by `fp4cast demo`, the tests and the benchmarks. All are
exact; each plants, in a few blocks, what real files hold and naive casts get wrong: codes of -0, blocks of zeros with
scale bytes 0, 126 and far outside of the window, a spread of 18 that a shift saves, scale byte 0 with non-zero codes,
pairs and merged projections split across shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fp4cast.miniatures.compressed_tensors import draft_dense, draft_dense_013, draft_moe
from fp4cast.miniatures.deepseek_v4 import draft_deepseek_v4, draft_deepseek_v41
from fp4cast.miniatures.draft import Draft, mxfp4, write_checkpoint
from fp4cast.miniatures.gpt_oss import draft_gpt_oss
from fp4cast.miniatures.gpt_oss_experts import draft_gpt_oss_experts
from fp4cast.miniatures.gpt_oss_original import draft_gpt_oss_original
from fp4cast.miniatures.kimi_k3 import draft_kimi_k3
from fp4cast.miniatures.ling import draft_ling
from fp4cast.miniatures.mimo import draft_mimo
from fp4cast.miniatures.mlx import draft_mlx
from fp4cast.miniatures.modelopt import draft_modelopt
from fp4cast.miniatures.quark import draft_quark

__all__ = ["KINDS", "make", "mxfp4", "write_checkpoint"]

MAKERS: dict[str, Callable[[Draft], None]] = {
    "gpt-oss": draft_gpt_oss,
    "gpt-oss-original": draft_gpt_oss_original,
    "gpt-oss-experts": draft_gpt_oss_experts,
    "deepseek-v4": draft_deepseek_v4,
    "deepseek-v4.1": draft_deepseek_v41,
    "kimi-k3": draft_kimi_k3,
    "moe": draft_moe,
    "dense": draft_dense,
    "dense-0.13": draft_dense_013,
    "quark": draft_quark,
    "modelopt-mxfp4": draft_modelopt,
    "mimo-v2.6": draft_mimo,
    "ling-3": draft_ling,
    "mlx-mxfp4": draft_mlx,
}
KINDS = tuple(MAKERS)


def make(kind: str, path: Path, *, seed: int = 0, traps: bool = True) -> Path:
    """Write a small checkpoint.

    Args:
        kind: one of `KINDS`.
        path: the directory to make.
        seed: the seed of all its random numbers.
        traps: plant the traps; without them all half-blocks of all tensors stay verbatim.

    Returns:
        `path`.
    """
    draft = Draft(np.random.default_rng(seed), traps)
    MAKERS[kind](draft)
    names = [
        f"{draft.stem}{draft.first_shard + i:05d}-of-{len(draft.files):05d}.safetensors"
        for i in range(len(draft.files))
    ]
    write_checkpoint(path, dict(zip(names, draft.files, strict=True)), draft.config, draft.metadata)
    for name, document in draft.documents.items():
        (path / name).write_text(json.dumps(document, indent=2))
    (path / "generation_config.json").write_text('{"do_sample": true}\n')
    (path / "LICENSE").write_text("A licence that has to travel with the weights.\n")
    (path / "encoding").mkdir()
    (path / "encoding" / "tokens.py").write_text("TOKENS = 256\n")
    for decoy in draft.decoys:
        (path / decoy).parent.mkdir()
        (path / decoy).write_bytes(b"another format of the same weights")
    return path
