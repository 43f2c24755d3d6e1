"""NVIDIA ModelOpt: a Qwen3-MoE with quantized experts and attention, as nvidia-modelopt 0.47 exports it."""

from __future__ import annotations

from fp4cast.miniatures.compressed_tensors import add_moe
from fp4cast.miniatures.draft import Draft


def draft_modelopt(draft: Draft) -> None:
    """A Qwen3-MoE of two layers and four experts, with its algorithm in lower case, as the exporter spells it."""
    add_moe(draft, ".weight")
    ignore = ["lm_head", "model.embed_tokens", *(f"model.layers.{i}.{e}" for i in range(2) for e in _KEPT)]
    producer = {"name": "modelopt", "version": "0.47.0"}
    draft.config["quantization_config"] = {
        "ignore": ignore, "quant_algo": "mxfp4", "producer": producer, "quant_method": "modelopt",
    }  # fmt: skip
    draft.documents["hf_quant_config.json"] = {
        "producer": producer,
        "quantization": {"quant_algo": "mxfp4", "kv_cache_quant_algo": None, "exclude_modules": ignore},
    }


_KEPT = ("mlp.gate", "self_attn*")
