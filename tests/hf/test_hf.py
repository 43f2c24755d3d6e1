"""Loading with transformers what `convert` wrote: every value, and every way in which a checkpoint can be wrong."""

import importlib
import json
import logging
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file
from transformers import core_model_loading as loading
from transformers.quantizers import auto

import attention
import fp4cast
import fp4cast.hf
from fp4cast.errors import (
    CheckpointError,
    MissingExtraError,
    ShapeError,
    UnsupportedError,
    UsageError,
)
from fp4cast.formats import mxfp4_values, nvfp4_values
from fp4cast.hf import dequantize as values
from fp4cast.kernels import quantize_nvfp4
from fp4cast.miniatures import make
from models import tensors

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

TOKENS = torch.arange(20)[None]
W4A4 = {"activations": "w4a4", "input_scales": "1.0"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(source, destination) of a kind, made once."""
    made = {}

    def get(kind, **options):
        key = kind, *options
        if key not in made:
            at = tmp_path_factory.mktemp("hf")
            source = make(kind, at / "src")
            fp4cast.convert(source, at / "dst", **options)
            made[key] = source, at / "dst"
        return made[key]

    return get


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def write(path, weights, config):
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def config_of(path):
    return json.loads((path / "config.json").read_text())


def changed(path, to, weights=None, drop=(), **section):
    """A copy of a checkpoint with other tensors, and other entries in its quantization_config."""
    there = {name: tensor for name, tensor in tensors(path).items() if name not in drop}
    config = config_of(path)
    config["quantization_config"] |= section
    return write(to, there | (weights or {}), config)


def assert_same(a, b):
    """The same bits, the sign of zero included."""
    a, b = (each if isinstance(each, dict) else each.state_dict() for each in (a, b))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(tensor, b[name]) and torch.equal(tensor.signbit(), b[name].signbit()), name


def mxfp4(weights, module):
    codes, scales = (
        weights[f"{module}.{part}"].view(torch.uint8).numpy() for part in ("weight_packed", "weight_scale")
    )
    return torch.from_numpy(mxfp4_values(codes, scales)).bfloat16()


@pytest.mark.parametrize("options", [{}, W4A4], ids=["w4a16", "w4a4"])
def test_gpt_oss_is_what_transformers_loads_from_the_source(written, options, tmp_path):
    source, path = written("gpt-oss", **options)
    theirs, ours = load(source, quantization_config=transformers.Mxfp4Config(dequantize=True)), load(path)
    assert_same(theirs, ours)
    assert any(torch.any((each == 0) & each.signbit()) for each in ours.state_dict().values())
    assert torch.equal(theirs(TOKENS).logits, ours(TOKENS).logits)
    assert not hasattr(ours.config, "quantization_config") and not hasattr(ours, "hf_quantizer")
    ours.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    assert set(tensors(tmp_path)) == set(theirs.state_dict())
    assert_same(theirs, load(tmp_path))


def test_another_dtype(written):
    source, path = written("gpt-oss")
    for dtype in (torch.float32, torch.float64):
        plain = load(source, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=dtype)
        assert_same(plain, load(path, dtype=dtype))


def test_bf16_where_no_dtype_is_said(written, tmp_path):
    path = written("gpt-oss")[1]
    config = {key: value for key, value in config_of(path).items() if key != "torch_dtype"}
    # Its first tensor with a dtype that a model can have is a tensor scale.
    assert load(write(tmp_path, tensors(path), config)).dtype == torch.bfloat16


def test_dense(written, tmp_path):
    source, path = written("dense")
    model, weights = load(path), tensors(source)
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        assert_same({name: weights[name] if name in weights else mxfp4(weights, module)}, {name: tensor})
    model.save_pretrained(tmp_path)
    assert_same(model, load(tmp_path))


@pytest.mark.parametrize("options", [{}, W4A4], ids=["w4a16", "w4a4"])
def test_experts_are_merged(written, options, tmp_path):
    source, path = written("moe", **options)
    model, weights = load(path), tensors(source)
    for name, tensor in model.state_dict().items():
        bank, _, leaf = name.rpartition(".")
        if not bank.endswith(".experts"):
            assert_same({name: weights[name]}, {name: tensor})
            continue
        for expert, merged in enumerate(tensor):
            leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            assert_same({name: torch.cat([mxfp4(weights, f"{bank}.{expert}.{one}") for one in leaves])}, {name: merged})
    model.save_pretrained(tmp_path)
    saved = tensors(tmp_path)
    at = "model.layers.1.mlp.experts.3.up_proj"
    assert_same({at: saved[f"{at}.weight"]}, {at: mxfp4(weights, at)})
    assert not [name for name in saved if "scale" in name or "packed" in name]
    assert_same(model, load(tmp_path))


def quantized(name, weight):
    """The NVFP4 tensors of a weight [N, K], with a tensor scale that is no power of two, and their values."""
    codes, scales, tensor_scale = quantize_nvfp4(weight)
    exact = nvfp4_values(codes.numpy(), scales.numpy(), float(tensor_scale))
    made = {name: codes, f"{name}_scale": scales.view(torch.float8_e4m3fn), f"{name}_scale_2": tensor_scale}
    return made, torch.from_numpy(exact).float().bfloat16()


def test_linear_layers_beside_fused_experts(written, tmp_path):
    path = written("gpt-oss")[1]
    wanted, weights = load(path).state_dict(), {}
    for name in [name for name in wanted if "self_attn" in name and name.endswith("_proj.weight")]:
        made, wanted[name] = quantized(name, wanted[name])
        weights |= made
    assert len(weights) == 2 * 4 * 3
    ignore = ["lm_head", "model.embed_tokens", *(f"model.layers.{i}.mlp.router" for i in range(2))]
    assert_same(load(changed(path, tmp_path, weights, ignore=ignore)), wanted)


def test_a_layer_of_experts_that_is_not_quantized(written, tmp_path):
    path = written("moe")[1]
    model, weights = load(path), tensors(path)
    bank = "model.layers.0.mlp.experts"
    model.save_pretrained(tmp_path / "plain")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(bank)}
    weights |= {name: tensor for name, tensor in tensors(tmp_path / "plain").items() if name.startswith(bank)}
    config = config_of(path)
    del config["quantization_config"]["quantized_layers"][bank]
    assert_same(load(write(tmp_path / "dst", weights, config)), model)


def test_tied_embeddings_and_names_that_transformers_ignores(written, tmp_path):
    path = written("dense")[1]
    weights, config = tensors(path), config_of(path) | {"tie_word_embeddings": True}
    del weights["lm_head.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    model = load(write(tmp_path, weights, config))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    del weights["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"weight is missing .and 1 more.: expected a tensor for \[256, 64\]"):
        load(write(tmp_path, weights, config))


def test_a_tensor_of_which_several_parameters_are_made(written, tmp_path, monkeypatch):
    split = loading.WeightConverter(
        "mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], operations=[loading.Chunk(dim=0)]
    )
    transformers.conversion_mapping.get_checkpoint_conversion_mapping("llama")
    monkeypatch.setitem(transformers.conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [split])
    path = written("dense")[1]
    weights = tensors(path)
    for name in [name for name in weights if ".gate_proj." in name]:
        pair = weights.pop(name), weights.pop(name.replace("gate", "up"))
        fused = torch.cat([each.view(torch.uint8) for each in pair]).view(pair[0].dtype) if pair[0].ndim else pair[0]
        weights[name.replace("gate_proj", "both")] = fused
    model = load(write(tmp_path / "fused", weights, config_of(path)))
    model.save_pretrained(tmp_path / "saved")
    assert "model.layers.1.mlp.both.weight" in tensors(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)
    lost = [name for name in weights if ".0.mlp.both." in name]
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight is missing .and 1 more."):
        load(changed(tmp_path / "fused", tmp_path / "lost", drop=lost))
    monkeypatch.undo()
    assert_same(load(path), model)


def test_the_base_of_a_model(written):
    path = written("gpt-oss")[1]
    assert_same(transformers.AutoModel.from_pretrained(path), load(path).model)


def test_scales_of_a_kv_cache_are_passed_over(written, tmp_path):
    """transformers caches in the model's dtype; where no such cache is asked for, they are an error as before."""
    path = written("dense")[1]
    weights, config = tensors(path), config_of(path)
    scales = {f"model.layers.{i}.self_attn.{x}_proj.{x}_scale": torch.tensor(0.01) for i in (0, 1) for x in "kv"}
    config["quantization_config"]["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    model, info = load(write(tmp_path / "dst", weights | scales, config), output_loading_info=True)
    assert_same(load(path), model)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    del config["quantization_config"]["kv_cache_scheme"]
    with pytest.raises(CheckpointError, match=r"k_scale .* has no parameter for it"):
        load(write(tmp_path / "unasked", weights | scales, config))


def test_what_modelopt_exports(tmp_path):
    mtq = pytest.importorskip("modelopt.torch.quantization")
    export = importlib.import_module("modelopt.torch.export").export_hf_checkpoint
    packed = importlib.import_module("modelopt.torch.quantization.qtensor").NVFP4QTensor
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda each: each(TOKENS))
    export(model, export_dir=tmp_path)
    stored, loaded = tensors(tmp_path), load(tmp_path).state_dict()
    assert sum(f"{name}_scale" in stored for name in loaded) == 7
    for name, weight in loaded.items():
        theirs = stored[name]
        if theirs.dtype == torch.uint8:
            scale, double_scale = stored[f"{name}_scale"], stored[f"{name}_scale_2"]
            theirs = packed(weight.shape, torch.bfloat16, theirs).dequantize(
                scale=scale, double_scale=double_scale, block_sizes={-1: 16}, dtype=torch.float32, fast=False
            )
        assert torch.equal(theirs.bfloat16(), weight), name  # its dequantize gives +0 for codes of -0


@pytest.mark.parametrize(("kind", "options"), [("gpt-oss", W4A4), ("dense", {}), ("moe", W4A4)], ids=lambda v: str(v))
def test_a_tensor_that_is_missing(written, kind, options, tmp_path):
    path = written(kind, **options)[1]
    weights, config = tensors(path), config_of(path)
    for name in weights:
        rest = {other: tensor for other, tensor in weights.items() if other != name}
        with pytest.raises(CheckpointError, match=rf"^{name} is missing.*expected"):
            load(write(tmp_path, rest, config))


def test_experts_that_are_missing_or_left_over(written, tmp_path):
    path = written("moe")[1]
    weights, config = tensors(path), config_of(path)
    bank = "model.layers.1.mlp.experts"
    for lost in (f"{bank}.3.", f"{bank}.0.gate_proj.", f"{bank}.2.down_proj."):
        rest = {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}
        with pytest.raises(CheckpointError, match=rf"^{lost}.*weight is missing: {bank}.* has 4 experts"):
            load(write(tmp_path, rest, config))
    rest = {name: tensor for name, tensor in weights.items() if not name.endswith("up_proj.weight")}
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is missing"):
        load(write(tmp_path, rest, config))
    rest = {name: tensor for name, tensor in weights.items() if not (name.startswith(bank) and ".up_proj." in name)}
    with pytest.raises(
        ShapeError, match=rf"{bank}.gate_up_proj: expected 49152 weights .* of .*up_proj.weight, got 24576"
    ):
        load(write(tmp_path, rest, config))
    more = {name.replace(f"{bank}.3.", f"{bank}.4."): tensor for name, tensor in weights.items()}
    with pytest.raises(CheckpointError, match=rf"^{bank}.4.*: {bank}.* has 4 experts; expected none"):
        load(write(tmp_path, {name: tensor.clone() for name, tensor in (more | weights).items()}, config))


ONE = torch.tensor(1.0)
LEFT_OVER = {
    "model.layers.0.mlp.extra.weight": (torch.zeros(4, 4), "has no parameter for it"),
    "surprise": (ONE, "GptOssForCausalLM has no parameter for it; expected none"),
    "lm_head.weight_scale": (ONE, "the config does not call lm_head quantized"),
    "model.norm.weight_scale_2": (ONE, r"model.norm.weight .* is not quantized; expected codes in U8"),
    "model.layers.0.mlp.experts.down_proj_input_scale": (ONE, "the config says W4A16; expected no such tensor"),
    "model.layers.0.mlp.experts.down_proj_blocks": (torch.zeros(4, 96, 3, 16, dtype=torch.uint8), "has no parameter"),
    "model.layers.0.mlp.experts.down_proj_scales": (torch.zeros(4, 96, 3, dtype=torch.uint8), "has no parameter"),
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_a_tensor_that_is_left_over(written, name, tmp_path):
    tensor, words = LEFT_OVER[name]
    with pytest.raises(CheckpointError, match=words) as caught:
        load(changed(written("gpt-oss")[1], tmp_path, {name: tensor}))
    assert name in str(caught.value)


DOWN = "model.layers.1.mlp.experts.down_proj"
WRONG = {
    "dtype of codes": (DOWN, lambda t: t.view(torch.int8), r"expected U8 \[4, 48, 96\]"),
    "shape of codes": (DOWN, lambda t: t[:, :24], r"expected F8_E4M3 \[4, 3, 96\] for codes \[4, 24, 96\]"),
    "experts in codes": (DOWN, lambda t: t[:3], r"expected F8_E4M3 \[3, 6, 96\]"),
    "rank of codes": (DOWN, lambda t: t[0], r"expected \[N, K/2\], or \[E, K/2, N\]"),
    "part of a block": (DOWN, lambda t: t[:, :47], "with whole blocks of 16"),
    "dtype of block scales": (f"{DOWN}_weight_scale", lambda t: t.view(torch.uint8), r"expected F8_E4M3 \[4, 6, 96\]"),
    "shape of block scales": (f"{DOWN}_weight_scale", lambda t: t.mT, r"expected F8_E4M3 \[4, 6, 96\]"),
    "dtype of S": (f"{DOWN}_weight_scale_2", lambda t: t.bfloat16(), r"expected F32 \[\]"),
    "shape of S": (f"{DOWN}_weight_scale_2", lambda t: t[None], r"expected F32 \[\]"),
    "shape of a bias": (f"{DOWN}_bias", lambda t: t[:3], r"expected one tensor \[4, 96\]"),
    "dtype of a norm": ("model.norm.weight", lambda t: t.view(torch.int16), "expected BF16 or F16 or F32 or F64"),
    "codes in a norm": ("model.norm.weight", lambda t: t.to(torch.uint8), "is missing: model.norm is NVFP4"),
    "codes in a head": ("lm_head.weight", lambda t: t.to(torch.uint8), "does not call lm_head quantized"),
    "FP8 in a head": (
        "lm_head.weight",
        lambda t: t.to(torch.float8_e4m3fn),
        "does not call it quantized; expected BF16",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_that_is_wrong(written, case, tmp_path):
    name, change, words = WRONG[case]
    path = written("gpt-oss")[1]
    with pytest.raises(CheckpointError, match=words) as caught:
        load(changed(path, tmp_path, {name: change(tensors(path)[name])}), ignore_mismatched_sizes=True)
    assert name in str(caught.value)


def test_all_of_a_bank_in_the_wrong_size(written, tmp_path):
    path = written("gpt-oss")[1]
    parts = {name: tensors(path)[name][:3] for name in (DOWN, f"{DOWN}_weight_scale")}
    with pytest.raises(ShapeError, match=rf"{DOWN} .*: expected one tensor \[4, 96, 96\] for {DOWN}"):
        load(changed(path, tmp_path, parts))


def test_weights_that_are_plain_where_the_config_says_nvfp4(written, tmp_path):
    for kind, module, drop in (
        ("dense", "model.layers.0.self_attn.q_proj", ".weight"),
        ("moe", "model.layers.0.mlp.experts.0.up_proj", ".weight"),
        ("gpt-oss", "model.layers.0.mlp.experts.down_proj", ""),
    ):
        path = written(kind)[1]
        shape = list(tensors(path)[module + drop].shape)
        shape[1] *= 2
        scales = [name for name in tensors(path) if name.startswith(module) and "scale" in name]
        assert len(scales) == 2
        plain = {module + drop: torch.zeros(shape, dtype=torch.bfloat16)}
        with pytest.raises(ShapeError, match=f"{module}.*: the config calls {module} NVFP4; expected U8 codes"):
            load(changed(path, tmp_path / kind, plain, scales))
    layers = {f"model.layers.0.mlp.experts.{expert}": {"quant_algo": "W4A16_NVFP4"} for expert in (1, 2, 3)}
    layers["model.layers.1.mlp.experts"] = layers["model.layers.0.mlp.experts.1"]
    path, at = written("moe")[1], "model.layers.0.mlp.experts.0."
    scales = [name for name in tensors(path) if name.startswith(at) and "scale" in name]
    plain = {f"{at}{leaf}_proj.weight": torch.zeros(96, 64, dtype=torch.bfloat16) for leaf in ("gate", "up")}
    plain[f"{at}down_proj.weight"] = torch.zeros(64, 96, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"some experts of .* are NVFP4 and some are not"):
        load(changed(path, tmp_path / "some", plain, scales, quantized_layers=layers))


CONFIGS = {
    "algorithm": {"quant_algo": "FP8"},
    "no algorithm": {"quant_algo": None},
    "ignore": {"ignore": "lm_head"},
    "ignored numbers": {"ignore": [1]},
    "group": {"group_size": 32},
    "group in words": {"group_size": "16"},
    "groups": {"config_groups": []},
    "no weights": {"config_groups": {"group_0": {}}},
    "bits": {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
    "weights' group": {"config_groups": {"group_0": {"weights": {"group_size": 128}}}},
    "no layers": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}},
    "a list of layers": {"quant_algo": "MIXED_PRECISION", "quantized_layers": ["model.layers.0"]},
    "layers in words": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": "NVFP4"}},
    "a layer's group": {"quantized_layers": {"a": {"quant_algo": "NVFP4", "group_size": 32}}},
    "two algorithms": {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "FP8"}},
    },
    "only other layers": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A16_NVFP4"}}},
}


def test_attention_in_fp8_is_refused(tmp_path):
    fp4cast.convert(attention.qwen3_moe(tmp_path / "src"), tmp_path / "dst", fp8="attention")
    with pytest.raises(UnsupportedError, match="is FP8_PB_WO, FP8 that is not read here"):
        load(tmp_path / "dst")


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_malformed(written, case, tmp_path):
    with pytest.raises(CheckpointError):
        load(changed(written("gpt-oss")[1], tmp_path, **CONFIGS[case]))


def test_no_tensor_is_nvfp4(written, tmp_path):
    path = written("dense")[1]
    load(path).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="no tensor is NVFP4"):
        load(write(tmp_path, tensors(tmp_path), config_of(path)))


def test_scales_that_are_no_numbers(written, tmp_path):
    path = written("gpt-oss")[1]
    block = tensors(path)[f"{DOWN}_weight_scale"].clone()
    block.view(torch.uint8)[1, 2, 3] = 0x7F
    with pytest.raises(CheckpointError, match=f"{DOWN}: a block scale is NaN"):
        load(changed(path, tmp_path, {f"{DOWN}_weight_scale": block}))
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(CheckpointError, match=f"{DOWN}: a tensor scale is {wrong}, expected a positive number"):
            load(changed(path, tmp_path, {f"{DOWN}_weight_scale_2": torch.tensor(wrong)}))


def test_a_name_in_two_shards(written, tmp_path):
    path = written("dense")[1]
    weights, config = tensors(path), config_of(path)
    write(tmp_path, weights, config)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"]}, tmp_path / "b.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "a.safetensors") | {"more": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model.norm.weight .* b.safetensors.: is in a.safetensors too"):
        load(tmp_path)


def test_what_it_does_not_do(written, tmp_path):
    path = written("dense")[1]
    model = load(path)
    model.save_pretrained(tmp_path)
    config = fp4cast.hf.ModelOptNvfp4Config(**config_of(path)["quantization_config"])
    with pytest.raises(UsageError, match="quantizes none"):
        load(tmp_path, quantization_config=config)
    with pytest.raises(UsageError, match="pass no state_dict"):
        type(model).from_pretrained(None, config=transformers.AutoConfig.from_pretrained(path), state_dict={})
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(UnsupportedError, match="expected a safetensors file"):
        load(tmp_path)


def test_the_config_as_transformers_holds_it(written):
    section = config_of(written("moe")[1])["quantization_config"]
    config = auto.AutoQuantizationConfig.from_dict(section)
    assert isinstance(config, fp4cast.hf.ModelOptNvfp4Config)
    assert config.to_dict() == section and json.loads(config.to_json_string()) == section
    assert config.quant_method == "modelopt_mixed" and config.dequantize


def test_registration(monkeypatch, caplog):
    assert fp4cast.hf.METHODS == fp4cast.hf.register() == ("modelopt", "modelopt_mixed")
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", dict(auto.AUTO_QUANTIZER_MAPPING))
    monkeypatch.setattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
    importlib.reload(fp4cast.hf)
    theirs = type("Another", (auto.AUTO_QUANTIZER_MAPPING["awq"],), {"__module__": "another.package"})
    auto.AUTO_QUANTIZER_MAPPING["modelopt"] = theirs
    with caplog.at_level(logging.WARNING):
        assert fp4cast.hf.register() == ("modelopt_mixed",)
    assert "another.package.Another reads 'modelopt': fp4cast.hf.register(replace=True) takes over" in caplog.text
    assert auto.AUTO_QUANTIZER_MAPPING["modelopt"] is theirs
    assert fp4cast.hf.register(replace=True) == fp4cast.hf.METHODS
    assert auto.AUTO_QUANTIZER_MAPPING["modelopt"] is fp4cast.hf.ModelOptNvfp4Quantizer


@pytest.fixture
def native(monkeypatch):
    """transformers as it will be: it reads `modelopt` itself, and refuses where its pull requests refuse."""

    class Config(transformers.utils.quantization_config.QuantizationConfigMixin):
        def __init__(self, **section):
            self.section, self.quant_method = section, section["quant_method"]

    class Quantizer(transformers.quantizers.base.HfQuantizer):
        requires_calibration = False
        is_trainable, is_serializable = False, lambda _: True

        def validate_environment(self, *args, **kwargs):
            raise NotImplementedError("theirs")

    Config.__module__ = Quantizer.__module__ = "transformers.quantizers.finegrained.nvfp4"
    for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        monkeypatch.setattr(auto, name, dict(getattr(auto, name)))
    for method in fp4cast.hf.METHODS:
        auto.AUTO_QUANTIZER_MAPPING[method], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = Quantizer, Config
    return Quantizer, Config


def gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 9), (12, 0)])
@pytest.mark.parametrize("kind", ["dense", "moe", "gpt-oss"])
def test_once_transformers_reads_it_each_serves_what_it_can(written, native, monkeypatch, kind, capability):
    path = written(kind)[1]
    assert fp4cast.hf.register() == fp4cast.hf.register() == fp4cast.hf.METHODS
    gpu(monkeypatch, capability)
    section = config_of(path)["quantization_config"]
    config = auto.AutoQuantizationConfig.from_dict(section)
    theirs = kind == "dense" and capability is not None and capability >= (8, 9)
    assert isinstance(config, native[1] if theirs else fp4cast.hf.ModelOptNvfp4Config)
    quantizer = auto.AutoHfQuantizer.from_config(config, pre_quantized=True)
    assert isinstance(quantizer, native[0] if theirs else fp4cast.hf.ModelOptNvfp4Quantizer)


@pytest.mark.usefixtures("native")
def test_on_a_cpu_it_loads_as_before_once_transformers_reads_it(written):
    path = written("dense")[1]
    with pytest.raises(NotImplementedError, match="theirs"):
        load(path)
    fp4cast.hf.register()
    before = {name: tensor.clone() for name, tensor in load(path).state_dict().items()}
    fp4cast.hf.register(replace=True)
    assert_same(load(path), before)


@pytest.mark.usefixtures("native")
def test_who_takes_over_takes_all(monkeypatch):
    fp4cast.hf.register()
    gpu(monkeypatch, (12, 0))
    assert fp4cast.hf.register(replace=True) == fp4cast.hf.METHODS
    assert auto.AUTO_QUANTIZER_MAPPING["modelopt"] is fp4cast.hf.ModelOptNvfp4Quantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["modelopt"] is fp4cast.hf.ModelOptNvfp4Config


def test_without_transformers_or_with_an_old_one(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fp4cast.hf")]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as old:
        old.delattr(loading.ConversionOps, "supports_many_to_many")
        with pytest.raises(
            MissingExtraError, match=rf"needs transformers 5.23 or newer, {transformers.__version__} is"
        ):
            importlib.import_module("fp4cast.hf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"fp4cast\[ptq\]"):
        importlib.import_module("fp4cast.hf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_are_rounded_once(monkeypatch, dtype):
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (48, 64), dtype=torch.uint8, generator=rng)
    scales = torch.randint(0, 0x7F, (48, 8), dtype=torch.uint8, generator=rng)
    for scale in (torch.tensor(0.0123), torch.tensor(2.0**-126)):
        exact = torch.from_numpy(nvfp4_values(codes.numpy(), scales.numpy(), float(scale)))
        wanted = exact if dtype == torch.float64 else exact.float().to(dtype)
        for piece in (1 << 23, 100):
            monkeypatch.setattr(values, "_PIECE", piece)
            block = scales.view(torch.float8_e4m3fn)
            assert_same({"": values.dequantize(codes, block, scale, dtype)}, {"": wanted})
            bank = (each.reshape(3, 16, -1).mT.contiguous() for each in (codes, block.view(torch.uint8)))
            transposed = values.dequantize(next(bank), next(bank).view(torch.float8_e4m3fn), scale, dtype)
            assert_same({"": transposed.mT}, {"": wanted.reshape(3, 16, -1)})


def test_a_device_map(written):
    pytest.importorskip("accelerate")
    for kind in ("gpt-oss", "moe"):
        assert_same(load(written(kind)[1], device_map="cpu"), load(written(kind)[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["gpt-oss", "moe", "dense"])
def test_on_a_gpu(written, kind):
    pytest.importorskip("accelerate")
    model = load(written(kind)[1], device_map="cuda")
    assert {each.device.type for each in model.parameters()} == {"cuda"}
    assert_same(load(written(kind)[1]), model.cpu())
