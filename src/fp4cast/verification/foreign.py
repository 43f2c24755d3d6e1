"""Casts of other tools: their weights are judged as strictly as ours, what they write around them is listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.verification.report import Difference

_ARGUMENTS = {"actorder", "block_structure", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
_AROUND = {"config", "header", "index", "scale"}


def maker(config: Mapping[str, Any], beside: Mapping[str, Any] | None) -> str:
    """The tool that wrote a destination's configs, by what it writes and fp4cast does not; empty if it may be ours.

    Args:
        config: config.json.
        beside: hf_quant_config.json, or None where there is none.
    """
    section = find_quantization_config(config).section
    if section.get("quant_method") == "compressed-tensors":
        # compressed-tensors writes more arguments of a group than fp4cast, which writes those that say something.
        more = any(_ARGUMENTS & weights.keys() for weights in _weights(section.get("config_groups")))
        return f"compressed-tensors {str(section.get('version', ''))[:50]}".rstrip() if more else ""
    said = [document.get("producer") for document in (section, beside or {})]
    names = {str(each.get("name"))[:50] for each in said if isinstance(each, dict)}
    return names.pop() if len(names) == 1 and names != {"fp4cast"} else ""


def _weights(groups: object) -> list[Mapping[str, Any]]:
    found = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in found if isinstance(group, dict)]
    return [each for each in weights if isinstance(each, dict)]


def tolerated(difference: Difference, tensors: Mapping[str, Tensor]) -> Difference:
    """A difference as it counts in another tool's cast: "metadata" where no value of a weight depends on it."""
    tensor = tensors.get(difference.name)
    scalar = tensor is not None and tensor.dtype == "F32" and tensor.shape in ((), (1,))
    if difference.kind in _AROUND or (scalar and difference.kind in ("unexpected", "shape")):
        return replace(difference, kind="metadata")
    return difference
