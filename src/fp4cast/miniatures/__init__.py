"""Faithful small checkpoints of every family: real names, dtypes, configs and shard splits, and the known traps.

Used by `fp4cast demo`, the tests and the benchmarks. All are exact; each plants, in a few blocks, what real files hold
and naive casts get wrong: codes of -0, blocks of zeros with scale bytes 0, 126 and far outside of the window, a spread
of 18 that a shift saves, scale byte 0 with non-zero codes, pairs and fused projections split across shards.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fp4cast.miniatures.draft import Draft, mxfp4, write_checkpoint
from fp4cast.miniatures.families import MAKERS

__all__ = ["KINDS", "make", "mxfp4", "write_checkpoint"]

KINDS = tuple(MAKERS)


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
    MAKERS[kind](draft)
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
