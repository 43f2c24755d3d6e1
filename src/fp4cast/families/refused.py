"""Recognise checkpoints that fp4cast refuses, and explain why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.quantization_config import find_quantization_config


class Refused(NamedTuple):
    """A layout of 4-bit weights that fp4cast does not cast.

    Attributes:
        codes: suffix of the codes' name.
        dtype: of the codes.
        partner: suffix of the scales' name.
        dtypes: of the scales.
        what: its description, for people.
        hint: what to do about it; empty where fp4cast does not read it yet.
    """

    codes: str
    dtype: str
    partner: str
    dtypes: tuple[str, ...]
    what: str
    hint: str = ""


_NOTHING = "There is nothing to cast. The way back: fp4cast convert SRC DST --to mxfp4"

REFUSED = (
    Refused(".weight_packed", "U8", ".weight_scale", ("F8_E4M3",), "already NVFP4 (compressed-tensors)", _NOTHING),
    Refused(".weight", "U8", ".weight_scale", ("F8_E4M3",), "already NVFP4 (ModelOpt)", _NOTHING),
    Refused("_proj", "U8", "_proj_weight_scale", ("F8_E4M3",), "already NVFP4 (ModelOpt, banks of experts)", _NOTHING),
    Refused(
        ".weight", "U32", ".scales", ("U8",), "MLX's, of codes as U32 that are not mxfp4",
        "Its scales fit another mode (nvfp4, mxfp8): name the checkpoint that it was made from.",
    ),
    Refused(
        ".weight", "U8", ".weight_scale", ("U8", "F8_E8M0"), "named like MXFP4 of AMD Quark, ModelOpt and MiMo",
        "Its config.json names none of them as the maker: expected the quantization_config that it was exported with.",
    ),
    Refused(
        ".weight", "I8", ".weight_scale_inv", ("U8", "F8_E8M0"), "named like MXFP4 of Ling-3.0",
        "Its config.json does not say so: expected a quantization_config with routed_experts_quant_method mxfp4.",
    ),
)  # fmt: skip


def describe(config: Mapping[str, Any], tensors: Mapping[str, Tensor], titles: Sequence[str]) -> tuple[str, str]:
    """(what a checkpoint without castable weights is, what to do about it), for people.

    Args:
        config: its config.json.
        tensors: its tensors by name.
        titles: the titles of the families that fp4cast reads.
    """
    not_yet = f"fp4cast does not read this layout yet; it reads {', '.join(titles[:-1])} and {titles[-1]}."
    for found in _found(tensors):
        return f"this checkpoint is {found.what}", found.hint or not_yet
    method = find_quantization_config(config).section.get("quant_method")
    if method == "quark" and any(spec.get("dtype") == "mx" for spec in quark_specs(config)):
        return "this is a Quark checkpoint in its legacy layout, scales and codes in one tensor", not_yet
    return (
        f"no MXFP4 weights: the checkpoint is {_main_dtype(tensors)}"
        + (f" (quant_method {method!r})" if method else ""),
        "`fp4cast convert` casts MXFP4 checkpoints; one in BF16 can be quantized: fp4cast ptq --help",
    )


def _found(tensors: Mapping[str, Tensor]) -> Iterable[Refused]:
    for refused in REFUSED:
        for name, tensor in tensors.items():
            if tensor.dtype == refused.dtype and name.endswith(refused.codes):
                scales = tensors.get(name.removesuffix(refused.codes) + refused.partner)
                if scales is not None and scales.dtype in refused.dtypes:
                    yield refused


def quark_specs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How AMD Quark's config says that weights are quantized: in the whole model, in some layers, in some types."""
    section = find_quantization_config(config).section
    groups = [section.get("global_quant_config")]
    for name in ("layer_quant_config", "layer_type_quant_config"):
        layers = section.get(name)
        groups += layers.values() if isinstance(layers, dict) else ()
    for group in groups:
        if isinstance(group, dict) and isinstance(weight := group.get("weight"), dict):
            yield weight


def _main_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The dtype that most bytes have."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default="empty")
