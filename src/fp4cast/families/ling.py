"""Ling-3.0: MXFP4 experts beside FP8 weights whose scales have the same suffix.

The config says `quant_method: fp8` with `routed_experts_quant_method: mxfp4`. Read in vLLM 0.32.0,
model_executor/models/bailing_moe_v3.py:230-282 (the experts' `weight_scale_inv` are E8M0), and in SGLang 0.5.23,
srt/layers/quantization/fp8.py:1604-1640 (codes I8). The layer after the last one is the draft model's.
"""

from __future__ import annotations

from fp4cast.families.family import W4A4_ALONE, Family, Suffix
from fp4cast.families.mimo import OF_MXFP4, SIZES, stores_mxfp4

LING = Family(
    name="ling-3",
    title="Ling-3.0",
    codes=Suffix(".weight", ("I8",)),
    scales=Suffix(".weight_scale_inv", ("U8", "F8_E8M0")),
    module=r"\.mlp\.experts\.",
    layouts=("modelopt",),
    activations=("w4a4",),
    hint=W4A4_ALONE,
    kv_cache=False,
    beside_fp8=("*.attention.*", "*.mlp.shared_experts.*", "lm_head"),
    drops=(*OF_MXFP4, *SIZES),
    described=stores_mxfp4,
)
