"""The attention of a family's models, for `--fp8 attention`: which weights, and what engines merge of them.

Read in NVIDIA/Model-Optimizer at 224bbd0, examples/kimi/kimi_k3/quantize_to_nvfp4.py, in vLLM 0.32 and in SGLang.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple


class Merged(NamedTuple):
    """Projections that engines load into one matrix.

    Attributes:
        names: what engines call the matrix, in the place of a projection's name.
        parts: the projections, in the order of their rows.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]


class Attention(NamedTuple):
    """The attention of a family.

    Attributes:
        modules: a pattern of the modules whose weights become FP8.
        merged: what engines merge, wherever all parts are there.
    """

    modules: str
    merged: tuple[Merged, ...]

    def among(self, modules: Collection[str]) -> Iterator[tuple[str, Merged]]:
        """(the attention's name, what is merged of it) wherever every part is among a checkpoint's modules."""
        present = frozenset(modules)
        for parent in sorted({name.rpartition(".")[0] for name in present if re.search(self.modules, name)}):
            for merged in self.merged:
                if all(f"{parent}.{part}" in present for part in merged.parts):
                    yield parent, merged


_QKVG = ("q_proj", "k_proj", "v_proj", "g_proj")
_LATENT = ("q_a_proj", "kv_a_proj_with_mqa")

KIMI_K3_ATTENTION = Attention(
    r"^language_model\.model\.layers\.\d+\.self_attn\."
    r"(q|k|v|g|o|b|f_a|f_b|q_a|q_b|kv_b)_proj$|\.self_attn\.kv_a_proj_with_mqa$",
    (
        Merged(("in_proj_qkvgfab",), (*_QKVG, "f_a_proj", "b_proj")),
        Merged(("fused_qkvg_proj",), _QKVG),
        Merged(("fused_qkv_a_g_proj",), (*_LATENT, "g_proj")),
        Merged(("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"), _LATENT),
    ),
)
PLAIN_ATTENTION = Attention(
    r"^(model\.|language_model\.|model\.language_model\.|language_model\.model\.)?layers\.\d+\.self_attn\.(q|k|v|o)_proj$",
    (Merged(("qkv_proj",), ("q_proj", "k_proj", "v_proj")),),
)
