"""Recognise checkpoints that fp4cast refuses, and explain why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        cast: it is NVFP4 already; otherwise fp4cast does not read it yet.
    """

    codes: str
    dtype: str
    partner: str
    dtypes: tuple[str, ...]
    what: str
    cast: bool = False


_CAST = "There is nothing to cast. The way back: fp4cast convert SRC DST --to mxfp4"

REFUSED = (
    Refused(".weight_packed", "U8", ".weight_scale", ("F8_E4M3",), "already NVFP4 (compressed-tensors)", cast=True),
    Refused(".weight", "U8", ".weight_scale", ("F8_E4M3",), "already NVFP4 (ModelOpt)", cast=True),
    Refused("_proj", "U8", "_proj_weight_scale", ("F8_E4M3",), "already NVFP4 (ModelOpt, banks of experts)", cast=True),
    Refused(".weight", "U32", ".scales", ("U8",), "MLX mxfp4 (codes as U32)"),
    Refused(".weight", "U8", ".weight_scale", ("U8", "F8_E8M0"), "MXFP4 as MiMo, Quark or ModelOpt write it"),
    Refused(".weight", "I8", ".weight_scale_inv", ("U8", "F8_E8M0"), "MXFP4 as Ling-3.0 writes it"),
)


def describe(config: Mapping[str, Any], tensors: Mapping[str, Tensor], titles: Sequence[str]) -> tuple[str, str]:
    """(what a checkpoint without castable weights is, what to do about it), for people.

    Args:
        config: its config.json.
        tensors: its tensors by name.
        titles: the titles of the families that fp4cast reads.
    """
    not_yet = f"fp4cast does not read this layout yet; it reads {', '.join(titles[:-1])} and {titles[-1]}."
    for found in _found(tensors):
        return f"this checkpoint is {found.what}", _CAST if found.cast else not_yet
    if any(name.endswith((".mlp1_weight.blocks", ".mlp2_weight.blocks")) for name in tensors):
        return "this is gpt-oss's original/ layout", "Pass the directory above it, which holds the Hugging Face layout."
    method = find_quantization_config(config).section.get("quant_method")
    if method == "quark":
        return "this is a Quark checkpoint in its legacy layout", not_yet
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


def _main_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The dtype that most bytes have."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default="empty")
