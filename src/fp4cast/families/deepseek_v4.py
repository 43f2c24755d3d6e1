"""DeepSeek-V4 and V4.1: MXFP4 experts beside FP8 weights that are named alike.

The config is that of nvidia/DeepSeek-V4.1-Flash-NVFP4, and what vLLM 0.32 reads: `moe_quant_algo` in
models/deepseek_v41/quant_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fp4cast.families.family import W4A4_ALONE, Family, Suffix

# What NVFP4 experts add to the quantization_config of the FP8 checkpoint around them.
_ADDED = {
    "moe_quant_algo", "quant_algo", "group_size", "ignore", "quantized_layers", "config_groups", "producer",
    "kv_cache_scheme",
}  # fmt: skip


def _section(section: Mapping[str, Any], _: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in _ADDED}


DEEPSEEK_V4 = Family(
    name="deepseek-v4",
    title="DeepSeek-V4",
    codes=Suffix(".weight", ("I8",)),
    scales=Suffix(".scale", ("F8_E8M0",)),
    module=r"\.experts\.",
    ambiguous=True,  # V4.1 has tables of one-byte integers
    casts=r"\.ffn\.experts\.",
    keeps=r"^mtp\.",
    activations=("w4a4",),
    hint=W4A4_ALONE,
    layouts=("modelopt",),
    kv_cache=False,  # vLLM 0.32: models/deepseek_v4/quant_config.py passes `kv_cache_quant_algo=None`
    section=_section,
    beside_fp8=("*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"),
)
