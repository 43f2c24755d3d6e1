"""gpt-oss 20b and 120b: a bank of all experts in one tensor, as OpenAI publishes them on the Hub.

TensorRT-LLM's loader is from https://github.com/NVIDIA/TensorRT-LLM/pull/8956; what vLLM lacks is in
https://github.com/vllm-project/vllm/issues/46641.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fp4cast.families.family import Family, Suffix


def _section(_: Mapping[str, Any], __: Sequence[str]) -> dict[str, Any]:
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {"quant_method": "mxfp4", "modules_to_not_convert": kept}


GPT_OSS = Family(
    name="gpt-oss",
    title="gpt-oss",
    codes=Suffix("_blocks", ("U8",)),
    scales=Suffix("_scales", ("U8",)),
    bank=True,
    layouts=("modelopt",),
    section=_section,
)
