"""MiMo-V2.6: MXFP4 experts beside FP8 weights, named as Quark and ModelOpt name theirs.

The config says `quant_method: fp8` with `store_dtype: mxfp4`, or `routed_experts_quant_method: mxfp4`. Read in SGLang
0.5.23, srt/configs/model_config.py:721-742 and srt/models/mimo_v2.py:1714-1727 (the experts' scales lack the `_inv` of
those of FP8); https://github.com/sgl-project/sglang/pull/40448 added it.
"""

from __future__ import annotations

from fp4cast.checkpoints.directory import Checkpoint
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.families.family import W4A4_ALONE, Family
from fp4cast.families.quark import CODES, SCALES

# With one of these, engines take the experts for MXFP4.
OF_MXFP4 = ("store_dtype", "routed_experts_quant_method")
SIZES = ("mxfp4_block_size", "routed_experts_group_size")


def stores_mxfp4(checkpoint: Checkpoint) -> bool:
    """Whether the config describes an FP8 checkpoint whose experts are MXFP4."""
    section = find_quantization_config(checkpoint.config).section
    mxfp4 = any(str(section.get(key)).lower() == "mxfp4" for key in OF_MXFP4)
    return mxfp4 and section.get("quant_method") == "fp8"


MIMO = Family(
    name="mimo-v2.6",
    title="MiMo-V2.6",
    codes=CODES,
    scales=SCALES,
    module=r"\.mlp\.experts\.",
    layouts=("modelopt",),
    keeps=r"^model\.mtp\.",
    activations=("w4a4",),
    hint=W4A4_ALONE,
    kv_cache=False,
    beside_fp8=("*.self_attn.*", "model.mtp.*", "lm_head"),
    drops=(*OF_MXFP4, *SIZES),
    described=stores_mxfp4,
)
