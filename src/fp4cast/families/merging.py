"""The projections that engines merge into one matrix with one tensor scale, and the names of experts.

vLLM takes the largest of the projections' tensor scales, TensorRT-LLM asserts that they are equal.
"""

from __future__ import annotations

import re

# (name of the merged matrix, if it is a module; its projections).
_MERGED = (
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("", ("w1", "w3")),
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)
_ENGINE_NAME = {leaf: name for name, group in _MERGED if name for leaf in group}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.+)")

_GROUP = {leaf: group for _, group in _MERGED for leaf in group}


def shared_scale_group(module: str) -> tuple[str, tuple[str, ...]]:
    """(scale domain's name, modules) of the projections that must share a tensor scale with this one.

    >>> shared_scale_group("layers.0.ffn.experts.3.w3")
    ('layers.0.ffn.experts.3.w1+w3', ('layers.0.ffn.experts.3.w1', 'layers.0.ffn.experts.3.w3'))
    """
    parent, _, leaf = module.rpartition(".")
    group = _GROUP.get(leaf)
    if group is None:
        return module, (module,)
    prefix = f"{parent}." if parent else ""
    return prefix + "+".join(group), tuple(prefix + member for member in group)


def merged_module(module: str) -> str | None:
    """The module that an engine makes of a projection and those that it merges with; None for others.

    >>> merged_module("layers.0.self_attn.q_proj")
    'layers.0.self_attn.qkv_proj'
    """
    parent, _, leaf = module.rpartition(".")
    name = _ENGINE_NAME.get(leaf)
    return None if name is None else f"{parent}.{name}"


def expert_projection(module: str) -> tuple[str, str] | None:
    """(the bank, the projection) of a module that is one expert's; None for others.

    >>> expert_projection("layers.0.ffn.experts.3.w3")
    ('layers.0.ffn.experts', 'w3')
    """
    match = _EXPERT.fullmatch(module)
    return (match[1], match[2]) if match else None
