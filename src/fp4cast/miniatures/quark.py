"""AMD Quark: a Llama with exceptions by name, as amd-quark 0.13 exports it."""

from __future__ import annotations

from typing import Any

from fp4cast.miniatures.compressed_tensors import add_dense
from fp4cast.miniatures.draft import Draft


def spec(dtype: str, *, dynamic: bool) -> dict[str, Any]:
    """How Quark describes weights or activations in blocks of 32."""
    return {
        "block_size": None, "ch_axis": -1, "dtype": dtype, "enable_buffer_reuse": False, "group_size": 32,
        "is_dynamic": dynamic, "is_scale_quant": False, "max_input_numel": 4194304, "mx_element_dtype": None,
        "observer_cls": "PerBlockMXObserver", "qscheme": "per_group", "round_method": "half_even",
        "scale_calculation_mode": "even", "scale_format": "e8m0", "scale_type": "float", "symmetric": None,
        "zero_point_type": "int32",
    }  # fmt: skip


def layer(dtype: str) -> dict[str, Any]:
    """The config of layers whose weights and activations have one dtype."""
    return {
        "bias": None, "input_tensors": spec(dtype, dynamic=True), "output_tensors": None, "target_device": None,
        "weight": spec(dtype, dynamic=False),
    }  # fmt: skip


def quark(exclude: list[str]) -> dict[str, Any]:
    """The quantization_config of an MXFP4 model."""
    return {
        "algo_config": None,
        "exclude": exclude,
        "export": {
            "kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": layer("fp4"),
        "kv_cache_post_rope": False,
        "kv_cache_quant_config": {},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "softmax_quant_spec": None,
        "version": "0.13",
    }  # fmt: skip


def draft_quark(draft: Draft) -> None:
    """A Llama of two layers; the head is an exception."""
    add_dense(draft, ".weight")
    draft.config["quantization_config"] = quark(["lm_head"])
