"""compressed-tensors `mxfp4-pack-quantized`: dense models and mixtures of experts, a tensor for each projection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.families.family import Family, Suffix
from fp4cast.formats import E8M0_BIAS

PACKED = Suffix(".weight_packed", ("U8",))
PACKED_SCALES = Suffix(".weight_scale", ("F8_E8M0", "U8"))

# Engines load the language model of a multimodal one alone, and rename blocks of experts.
ALIASES = ((r"\.block_sparse_moe\.", ".mlp."), (r"^language_model\.", ""))


def packed_bias(config: Mapping[str, Any]) -> int:
    """compressed-tensors 0.13.x wrote scale bytes that are two too low; 0.14.0 fixed it."""
    version = str(find_quantization_config(config).section.get("version", ""))
    return E8M0_BIAS - 2 if re.match(r"0\.13(\D|$)", version) else E8M0_BIAS


COMPRESSED_TENSORS = Family(
    name="compressed-tensors",
    title="compressed-tensors mxfp4-pack-quantized",
    codes=PACKED,
    scales=PACKED_SCALES,
    layouts=("modelopt", "compressed-tensors"),
    aliases=ALIASES,
    bias=packed_bias,
)
