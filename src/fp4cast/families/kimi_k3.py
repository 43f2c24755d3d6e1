"""Kimi-K3: compressed-tensors experts inside a multimodal model, whose modules engines rename.

vLLM 0.32 maps its names in models/kimi_k3.
"""

from __future__ import annotations

from fp4cast.families.attention import KIMI_K3_ATTENTION
from fp4cast.families.compressed_tensors import ALIASES, PACKED, PACKED_SCALES, packed_bias, packed_section
from fp4cast.families.family import Family

KIMI_K3 = Family(
    name="kimi-k3",
    title="Kimi-K3",
    codes=PACKED,
    scales=PACKED_SCALES,
    module=r"^language_model\.model\.layers\.\d+\.block_sparse_moe\.experts\.",
    layouts=("modelopt", "compressed-tensors"),
    aliases=ALIASES,
    bias=packed_bias,
    section=packed_section,
    home=("text_config", "quantization_config"),
    attention=KIMI_K3_ATTENTION,
)
