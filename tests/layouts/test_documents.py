"""The documents that engines read, family by family."""

import json
import re

import numpy as np
import pytest

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.layouts.engine_view import read_claims

W4A16 = {"weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}}
W4A4 = {"input_activations": W4A16["weights"], **W4A16}


def documents(path):
    config = json.loads((path / "config.json").read_text())
    beside = path / "hf_quant_config.json"
    return config, json.loads(beside.read_text()) if beside.exists() else None


def converted_with(source, path, **options):
    fp4cast.convert(source, path, **options)
    return documents(path)


def test_gpt_oss_is_flat_modelopt_with_attention_and_router_ignored(converted):
    config, beside = documents(converted["gpt-oss"])
    section = config["quantization_config"]
    assert section["quant_method"] == "modelopt"
    assert section["quant_algo"] == "W4A16_NVFP4"
    assert section["ignore"] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.router",
        "model.layers.0.self_attn*",
        "model.layers.1.mlp.router",
        "model.layers.1.self_attn*",
    ]
    assert section["config_groups"] == {"group_0": W4A16 | {"targets": ["Linear"]}}
    assert beside["quantization"] == {
        "quant_algo": "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": section["ignore"],
    }


@pytest.mark.parametrize("kind", ["deepseek-v4", "deepseek-v4.1"])
def test_deepseek_keeps_its_fp8_keys_beside_the_experts(miniatures, converted, kind):
    before = json.loads((miniatures[kind] / "config.json").read_text())
    config, beside = documents(converted[kind])
    section = config["quantization_config"]
    assert before["quantization_config"].items() <= section.items(), "the source's FP8 keys stay"
    assert section["moe_quant_algo"] == "NVFP4"
    assert section["quant_algo"] == "MIXED_PRECISION"
    assert section["group_size"] == 16
    assert section["ignore"] == ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
    layers = {f"layers.{i}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for i in range(2)}
    assert section["quantized_layers"] == beside["quantization"]["quantized_layers"] == layers
    assert section["config_groups"] == {"group_0": W4A4 | {"targets": sorted(layers)}}
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    assert rest == {key: value for key, value in before.items() if key != "quantization_config"}


@pytest.mark.parametrize("kind", ["deepseek-v4", "deepseek-v4.1"])
def test_deepseek_mtp_experts_stay_mxfp4(miniatures, converted, kind):
    before, after = (open_checkpoint(path[kind]).tensors for path in (miniatures, converted))
    names = [name for name in before if name.startswith("mtp.")]
    assert names
    for name in names:
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape)
    assert "layers.0.ffn.experts.0.w1.scale" not in after


def test_kimi_k3_is_mixed_precision_under_every_spelling(converted):
    config, beside = documents(converted["kimi-k3"])
    section = config["quantization_config"]
    assert section["quant_method"] == "modelopt_mixed"
    assert section["ignore"] == beside["quantization"]["exclude_modules"] == []
    assert sorted(section["quantized_layers"]) == sorted(
        f"{prefix}model.layers.{i}.{block}.experts"
        for i in (1, 2)
        for prefix in ("language_model.", "")
        for block in ("block_sparse_moe", "mlp")
    )
    assert "quantization_config" not in config["text_config"], "or a loader reads NVFP4 as MXFP4"


def test_kimi_k3_in_compressed_tensors_keeps_the_place_of_its_manifest(miniatures, tmp_path):
    config, beside = converted_with(miniatures["kimi-k3"], tmp_path / "dst", layout="compressed-tensors")
    assert beside is None
    assert "quantization_config" not in config
    section = config["text_config"]["quantization_config"]
    assert section["format"] == "nvfp4-pack-quantized"
    assert "re:.*self_attn.*" in section["ignore"]
    assert "language_model.model.embed_tokens" in section["ignore"], "what was not cast is said, whoever forgot it"


@pytest.mark.parametrize(("activations", "expected"), [("w4a16", None), ("w4a4", "local")])
def test_compressed_tensors_groups(miniatures, tmp_path, activations, expected):
    scales = 1.0 if activations == "w4a4" else None
    config, _ = converted_with(
        miniatures["moe"], tmp_path / "d", layout="compressed-tensors", activations=activations, input_scales=scales
    )
    group = config["quantization_config"]["config_groups"]["group_0"]
    spec = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    assert group["weights"] == spec | {"dynamic": False}
    assert group["input_activations"] == (spec | {"dynamic": expected} if expected else None)
    assert group["targets"] == ["Linear"]


def test_generic_moe_lists_its_expert_banks(converted):
    config, beside = documents(converted["moe"])
    section = config["quantization_config"]
    assert section["quant_algo"] == beside["quantization"]["quant_algo"] == "MIXED_PRECISION"
    expected = {f"model.layers.{i}.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16} for i in range(2)}
    assert section["quantized_layers"] == expected


def test_a_dense_model_is_flat_modelopt(converted):
    config, _ = documents(converted["dense"])
    section = config["quantization_config"]
    assert (section["quant_algo"], section["group_size"]) == ("W4A16_NVFP4", 16)
    assert section["ignore"] == ["lm_head", "model.embed_tokens"]


def test_an_exception_that_is_part_of_a_cast_name_makes_it_mixed(tmp_path):
    """vLLM matches exceptions as substrings: an ignored `mlp.gate` would take `mlp.gate_proj` with it."""
    codes, scales = mini.mxfp4(np.random.default_rng(0), (8, 64))
    tensors = {
        "model.layers.0.mlp.gate_proj.weight_packed": ("U8", codes.reshape(8, -1)),
        "model.layers.0.mlp.gate_proj.weight_scale": ("U8", scales),
        "model.layers.0.mlp.gate.weight": ("BF16", np.zeros((4, 64), np.uint16)),
    }
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": tensors}, {})
    config, _ = converted_with(tmp_path / "src", tmp_path / "dst")
    assert config["quantization_config"]["quant_algo"] == "MIXED_PRECISION"
    assert list(config["quantization_config"]["quantized_layers"]) == ["model.layers.0.mlp.gate_proj"]


@pytest.mark.parametrize("kind", mini.KINDS)
def test_claims_are_what_was_done(converted, kind):
    claims = read_claims(documents(converted[kind])[0])
    tensors = open_checkpoint(converted[kind]).tensors
    modules = {name: re.sub(r"(\.weight|_blocks)$", "", name) for name in tensors}
    modules = {name: module for name, module in modules.items() if module != name and len(tensors[name].shape) > 1}
    cast = {module for module in modules.values() if f"{module}.weight_scale_2" in tensors}
    assert claims.quantized(modules.values()) == cast


@pytest.mark.parametrize("kind", mini.KINDS)
def test_no_producer_pretends_to_be_another(converted, kind):
    config, beside = documents(converted[kind])
    assert config["quantization_config"]["producer"]["name"] == "fp4cast"
    assert beside["producer"] == {"name": "fp4cast", "version": fp4cast.__version__}
