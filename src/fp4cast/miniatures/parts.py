"""Groups of tensors that several families share: experts, attention, embeddings."""

from __future__ import annotations

from collections.abc import Callable

from fp4cast.formats import Bytes
from fp4cast.miniatures.draft import VOCABULARY, Draft, mxfp4


def add_experts(
    draft: Draft, prefix: str, experts: int, hidden: int, inner: int, put: Callable[[int, str, Bytes, Bytes], None]
) -> None:
    """Routed experts w1, w3 [inner, hidden] and w2 [hidden, inner], with w1 and w3 of different spans."""
    for e in range(experts):
        for leaf, rows, columns in (("w1", inner, hidden), ("w2", hidden, inner), ("w3", inner, hidden)):
            codes, scales = draft.mxfp4(f"{prefix}.{e}.{leaf}", rows, columns, lower=2 if leaf == "w3" else 0)
            if draft.traps and leaf == "w2" and e == 1:  # byte 0 with codes that are not zero: 2^-127, and legal
                codes, scales = mxfp4(draft.rng, (rows, columns), center=6)
                scales[0, 0] = 0
            put(e, f"{prefix}.{e}.{leaf}", codes.reshape(rows, -1), scales)


def add_attention(
    draft: Draft, shard: int, prefix: str, hidden: int, heads: int, kv: int, head: int, bias: bool
) -> None:
    """Attention projections in BF16."""
    for name, rows, columns in (
        ("q_proj", heads * head, hidden),
        ("k_proj", kv * head, hidden),
        ("v_proj", kv * head, hidden),
        ("o_proj", hidden, heads * head),
    ):
        draft.bf16(shard, f"{prefix}.{name}.weight", rows, columns)
        if bias:
            draft.bf16(shard, f"{prefix}.{name}.bias", rows)


def add_globals(draft: Draft, hidden: int, prefix: str = "") -> None:
    """Embeddings, head and the last norm."""
    draft.bf16(0, f"{prefix}model.embed_tokens.weight", VOCABULARY, hidden)
    draft.bf16(1, f"{prefix}lm_head.weight", VOCABULARY, hidden)
    draft.ones(1, f"{prefix}model.norm.weight", hidden)
