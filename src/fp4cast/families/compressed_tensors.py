"""compressed-tensors `mxfp4-pack-quantized`: dense models and mixtures of experts, a tensor for each projection."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.families.attention import PLAIN_ATTENTION
from fp4cast.families.family import Family, Suffix
from fp4cast.formats import E8M0_BIAS, MX_BLOCK, NV_BLOCK

PACKED = Suffix(".weight_packed", ("U8",))
PACKED_SCALES = Suffix(".weight_scale", ("F8_E8M0", "U8"))

# Engines load the language model of a multimodal one alone, and rename blocks of experts.
ALIASES = ((r"\.block_sparse_moe\.", ".mlp."), (r"^language_model\.", ""))


def packed_bias(config: Mapping[str, Any]) -> int:
    """compressed-tensors 0.13.x wrote scale bytes that are two too low; 0.14.0 fixed it."""
    version = str(find_quantization_config(config).section.get("version", ""))
    return E8M0_BIAS - 2 if re.match(r"0\.13(\D|$)", version) else E8M0_BIAS


_WEIGHTS = {
    "num_bits": 4, "type": "float", "strategy": "group", "group_size": MX_BLOCK, "symmetric": True, "dynamic": False,
    "scale_dtype": "torch.uint8",
}  # fmt: skip


def packed_section(section: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """An NVFP4 checkpoint's own section with MXFP4 groups, where it is of compressed-tensors, too; else a new one."""
    said: dict[str, Any] = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    mxfp4: dict[str, Any] = {"input_activations": None, "weights": _WEIGHTS}
    groups = section.get("config_groups")
    if section.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
        group = {"targets": ["Linear"], **mxfp4}
        said |= {"format": "mxfp4-pack-quantized"}
        return {**said, "config_groups": {"group_0": group}, "ignore": list(kept)}
    name = "mixed-precision" if section.get("format") == "mixed-precision" else "mxfp4-pack-quantized"
    back = {key: {**group, **mxfp4} if _is_nvfp4(group) else group for key, group in groups.items()}
    for group in (group for key, group in back.items() if group is not groups[key] and "format" in group):
        group["format"] = "mxfp4-pack-quantized"
    return {**section, **said, "format": name, "config_groups": back}


def _is_nvfp4(group: object) -> bool:
    weights = group.get("weights") if isinstance(group, dict) else None
    return isinstance(weights, dict) and (weights.get("num_bits"), weights.get("group_size")) == (4, NV_BLOCK)


COMPRESSED_TENSORS = Family(
    name="compressed-tensors",
    title="compressed-tensors mxfp4-pack-quantized",
    codes=PACKED,
    scales=PACKED_SCALES,
    layouts=("modelopt", "compressed-tensors"),
    aliases=ALIASES,
    bias=packed_bias,
    section=packed_section,
    attention=PLAIN_ATTENTION,
)
