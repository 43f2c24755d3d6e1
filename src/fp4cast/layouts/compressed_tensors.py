"""compressed-tensors `nvfp4-pack-quantized`: the tensors' names, and the quantization_config in config.json.

Read in compressed-tensors 0.20 and in vLLM 0.32, model_executor/layers/quantization/compressed_tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp4cast.checkpoints.directory import CONFIG
from fp4cast.checkpoints.quantization_config import find_quantization_config, set_quantization_config
from fp4cast.errors import CheckpointError
from fp4cast.formats import MX_BLOCK, NV_BLOCK
from fp4cast.layouts.documents import plain_modules
from fp4cast.layouts.kv_cache import FP8
from fp4cast.layouts.layout import Form, Layout, Names, Writing


def _documents(writing: Writing) -> dict[str, dict[str, Any]]:
    """The source's quantization_config with its MXFP4 groups replaced."""
    section = dict(find_quantization_config(writing.config).section)
    old = section.get("ignore")
    ignore = [entry for entry in old if isinstance(entry, str)] if isinstance(old, list) else []
    groups = section.get("config_groups")
    groups = groups if isinstance(groups, dict) and groups else {"group_0": {"targets": ["Linear"]}}
    section |= {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if section.get("format") == "mixed-precision" else "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {name: _group(name, group, writing) for name, group in groups.items()},
        # Exact names beside the source's patterns, whether these cover them or not: nothing is left to a pattern.
        "ignore": ignore + sorted(set(plain_modules(writing)) - set(ignore)),
    }
    if writing.target.kv_cache != "none":
        section["kv_cache_scheme"] = {**FP8, "strategy": "tensor", "symmetric": True}
    set_quantization_config(writing.config, section)
    return {CONFIG: writing.config}


COMPRESSED_TENSORS = Layout(
    name="compressed-tensors",
    projection=Form(
        Names(".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale"), reciprocal=True
    ),
    bank=None,
    documents=_documents,
    kv_scales=(".k_scale", ".v_scale"),
    writes_constants=True,  # transformers leaves memory as it is where they are missing
)


def _group(name: str, group: Any, writing: Writing) -> dict[str, Any]:
    if not isinstance(group, dict):
        where = f"{writing.checkpoint.path / CONFIG}: config_groups.{name[:100]}"
        raise CheckpointError(f"{where} is {str(group)[:100]!r}, expected an object")
    weights = group.get("weights")
    if weights and not (isinstance(weights, dict) and _is_mxfp4(weights)):
        return group
    spec = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NV_BLOCK, "symmetric": True}
    activations = {**spec, "dynamic": "local"} if writing.target.activations == "w4a4" else None
    new = {**group, "weights": {**spec, "dynamic": False}, "input_activations": activations}
    return new | ({"format": "nvfp4-pack-quantized"} if "format" in group else {})


def _is_mxfp4(weights: Mapping[str, Any]) -> bool:
    wanted = {"num_bits": 4, "type": "float", "group_size": MX_BLOCK}
    return all(weights.get(key, value) == value for key, value in wanted.items())
