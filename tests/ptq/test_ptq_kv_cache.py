"""A KV cache in FP8, against ModelOpt's own export."""

import copy
import json
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import fp4cast
from fp4cast.errors import QuantizerError, UnsupportedError, UsageError
from fp4cast.ptq import QFORMATS, Headroom, attach, attach_kv_cache, export, flow, max_calibrate
from fp4cast.ptq.flow import Options, quantize
from helpers import edit
from models import FIXTURE, TINY, load_gpt_oss, pack, tensors

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(40).reshape(2, 20) * 7
SIZES = {"intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **SIZES))


def qwen3():  # keys are normalized before the rotary embedding
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TINY, **SIZES, **experts))


def phi3():  # q, k and v in one matrix
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**TINY, **SIZES))


def deepseek():  # a latent cache
    mla = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    sizes = {**TINY, **SIZES, "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, **mla, n_group=1, topk_group=1))


def saved(make, path):
    torch.manual_seed(0)
    make().to(torch.bfloat16).save_pretrained(path)
    return path


def load(path):
    if path == FIXTURE:
        return load_gpt_oss(path)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module", params=[llama, qwen3, phi3, None], ids=["llama", "qwen3", "phi3", "gpt-oss"])
def source(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp("kv") / "model") if request.param else FIXTURE


def exported(source, path, kv_cache_qformat, layout="modelopt", qformat="nvfp4_mlp_only"):
    model = load(source)
    attach(model, QFORMATS[qformat])
    if kv_cache_qformat == "fp8":
        attach_kv_cache(model)
    max_calibrate(model, lambda model: model(TOKENS))
    return export(model, path, source, layout=layout, kv_cache_qformat=kv_cache_qformat)


def theirs(source, path, kv_cache_qformat, qformat="nvfp4_mlp_only"):
    import modelopt.torch.quantization as mtq
    from modelopt.recipe.presets import KV_QUANT_CFG_CHOICES
    from modelopt.torch.export import export_hf_checkpoint

    cache = KV_QUANT_CFG_CHOICES[kv_cache_qformat]["quant_cfg"]
    rules = {"nvfp4": mtq.NVFP4_DEFAULT_CFG, "nvfp4_mlp_only": mtq.NVFP4_MLP_ONLY_CFG}[qformat]
    rules = mtq.update_quant_cfg_with_kv_cache_quant(copy.deepcopy(rules), cache)
    model = load(source)
    mtq.quantize(model, rules, lambda model: model(TOKENS))
    export_hf_checkpoint(model, export_dir=path)
    return path


def document(path, name):
    return json.loads((path / name).read_text())


def cache_scales(path):
    return {name: tensor for name, tensor in tensors(path).items() if name.endswith((".k_scale", ".v_scale"))}


@pytest.mark.oracle
@pytest.mark.parametrize("qformat", ["nvfp4", "nvfp4_mlp_only"])
@pytest.mark.parametrize("kv_cache_qformat", ["fp8", "fp8_cast"])
def test_an_export_equals_modelopt_s(source, tmp_path, kv_cache_qformat, qformat):
    peer = theirs(source, tmp_path / "peer", kv_cache_qformat, qformat)
    report = exported(source, tmp_path / "ours", kv_cache_qformat, qformat=qformat)
    assert tensors(tmp_path / "ours").keys() == tensors(peer).keys()
    assert report.kv_cache_qformat == report.to_json()["kv_cache_qformat"] == kv_cache_qformat
    scales, expected = cache_scales(tmp_path / "ours"), cache_scales(peer)
    assert scales.keys() == expected.keys() and bool(scales) == (kv_cache_qformat == "fp8")
    for name, scale in scales.items():
        assert (scale.dtype, scale.shape) == (torch.float32, ()) and torch.equal(scale, expected[name]), name
    ours, same = (document(each, "config.json")["quantization_config"] for each in (tmp_path / "ours", peer))
    assert ours["kv_cache_scheme"] == same["kv_cache_scheme"]
    ours, same = (document(each, "hf_quant_config.json")["quantization"] for each in (tmp_path / "ours", peer))
    assert ours["kv_cache_quant_algo"] == same["kv_cache_quant_algo"] == "FP8"


def test_keys_are_taken_as_they_are_cached(tmp_path):
    """After the rotary embedding, which changes the largest of them; a cache of transformers sees the same."""
    source = saved(llama, tmp_path / "model")
    exported(source, tmp_path / "dst", "fp8")
    model, before = load(source), []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda *args: before.append(args[2].abs().max().float() / 448))
    cache = model(TOKENS, use_cache=True).past_key_values
    scales = cache_scales(tmp_path / "dst")
    for layer, kept in enumerate(cache.layers):
        for letter, states in (("k", kept.keys), ("v", kept.values)):
            name = f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"
            assert scales[name] == states.abs().max().float() / 448
    assert before != [scales[f"model.layers.{layer}.self_attn.k_proj.k_scale"] for layer in (0, 1)]


@pytest.mark.oracle
def test_the_model_computes_with_the_rounded_cache_as_modelopt_s_does(tmp_path):
    import modelopt.torch.quantization as mtq

    source = saved(llama, tmp_path / "model")
    ours, peer, plain = load(source), load(source), load(source)
    attach_kv_cache(ours)
    max_calibrate(ours, lambda model: model(TOKENS))
    rules = [{"quantizer_name": "*", "enable": False}, *copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])]
    mtq.quantize(peer, {"quant_cfg": rules, "algorithm": "max"}, lambda model: model(TOKENS))
    expected = peer(TOKENS).logits
    assert not torch.equal(expected, plain(TOKENS).logits)
    for use_cache in (False, True):
        assert torch.equal(copy.deepcopy(ours)(TOKENS, use_cache=use_cache).logits, expected)


def test_the_flow_writes_it_and_verify_knows_it(tmp_path):
    """Into the ModelOpt layout, whose cast is that of `convert`; weights alone, which calibrate the cache's scales."""
    options = {"dataset": str(FIXTURE / "calibration.txt"), "calib_seq": 64, "calib_size": 2}
    for qformat, more in (("nvfp4_mlp_only", options), ("nvfp4_mlp_weight_only", options)):
        path = tmp_path / qformat
        done = quantize(Options(FIXTURE, path, qformat, cast_mxfp4_to_nvfp4=True, kv_cache_qformat="fp8", **more))
        assert done.exact and done.to_json()["kv_cache_qformat"] == "fp8"
        report = fp4cast.verify(FIXTURE, path)
        assert report.ok and report.kv_cache_qformat == "fp8" and report.exact
        assert len(cache_scales(path)) == 8
    quantize(Options(FIXTURE, tmp_path / "dst", "nvfp4_mlp_weight_only", kv_cache_qformat="fp8_cast"))
    report = fp4cast.verify(FIXTURE, tmp_path / "dst")
    assert report.ok and report.kv_cache_qformat == "fp8_cast"


def test_headroom_is_not_for_the_cache(tmp_path):
    """Its rule is one for NVFP4's blocks: FP8 has one scale for a whole cache."""
    scales = []
    for name, headroom in (("plain", None), ("headroom", Headroom())):
        options = {
            "dataset": str(FIXTURE / "calibration.txt"),
            "calib_size": 4,
            "calib_seq": 32,
            "device": "cpu",
            "kv_cache_qformat": "fp8",
        }
        quantize(Options(FIXTURE, tmp_path / name, "nvfp4_mlp_only", act_headroom=headroom, **options))
        scales.append(cache_scales(tmp_path / name))
    assert scales[0] and scales[0] == scales[1]


def test_verify_finds_scales_that_were_not_written(tmp_path):
    """By the digest; without a receipt, what no engine could use, and one that is alone."""
    written, name = tmp_path / "dst", "model.layers.1.self_attn.k_proj.k_scale"
    text = {"dataset": str(FIXTURE / "calibration.txt"), "calib_seq": 64, "calib_size": 2}
    quantize(Options(FIXTURE, written, "nvfp4_mlp_weight_only", True, kv_cache_qformat="fp8", **text))
    assert fp4cast.verify(FIXTURE, written).ok
    bit = shutil.copytree(written, tmp_path / "bit")
    edit(bit, name, lambda scale: scale.__setitem__(0, scale[0] ^ 1))
    (wrong,) = fp4cast.verify(FIXTURE, bit).differences
    assert str(wrong) == "fp4cast.json: the scales of the KV cache are not those that were written"
    (written / "fp4cast.json").unlink()
    report = fp4cast.verify(FIXTURE, written)
    assert report.ok and "the KV cache's scales" in report.notes[-1]
    edit(written, name, lambda scale: scale.fill(0))
    (wrong,) = fp4cast.verify(FIXTURE, written).differences
    assert wrong.name == name and "expected a positive normal FP32 number, got 0.0" in wrong.detail


def test_a_source_that_asks_for_a_cache_of_its_own_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "load_model", lambda *_: pytest.fail("a model was loaded"))
    source = shutil.copytree(FIXTURE, tmp_path / "src")
    config = document(source, "config.json")
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
    (source / "config.json").write_text(json.dumps(config))
    options = Options(source, tmp_path / "dst", "nvfp4_mlp_weight_only", True, kv_cache_qformat="fp8_cast")
    with pytest.raises(UsageError, match="has a kv_cache_scheme of its own"):
        quantize(options)


def test_compressed_tensors_has_names_and_a_scheme_of_its_own(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "moe").mkdir()
    source = pack(qwen3(), tmp_path / "moe", ("embed", "lm_head", "self_attn", "mlp.gate."))
    (tmp_path / "calibration.txt").write_text("hello world " * 100)
    found = {}
    for name in ("fp8", "fp8_cast"):
        attached = load_packed(tmp_path / "moe")
        if name == "fp8":
            attach_kv_cache(attached)
        max_calibrate(attached, lambda model: model(TOKENS))
        export(attached, tmp_path / name, source, layout="compressed-tensors", kv_cache_qformat=name)
        report = fp4cast.verify(source, tmp_path / name)
        assert report.ok and report.kv_cache_qformat == name
        found[name] = cache_scales(tmp_path / name)
        assert sorted(found[name]) == [f"model.layers.{i}.self_attn.{k}_scale" for i in (0, 1) for k in "kv"]
        assert all(scale.shape == (1,) for scale in found[name].values())
    assert all(scale == 1 for scale in found["fp8_cast"].values())
    assert all(0 < scale < 0.1 for scale in found["fp8"].values())


def load_packed(path):
    model = load(path / "bf16")
    attach(model, QFORMATS["nvfp4_experts_only"], static=True)
    return model


def test_a_latent_cache_is_refused_with_the_way_out(tmp_path):
    source = saved(deepseek, tmp_path / "model")
    text = tmp_path / "calibration.txt"
    text.write_text("hello world " * 100)
    options = Options(source, tmp_path / "dst", "nvfp4_mlp_only", dataset=str(text), kv_cache_qformat="fp8")
    with pytest.raises(UnsupportedError, match=r"self_attn: engines cache a latent vector .* fp8_cast"):
        quantize(options)
    with pytest.raises(UnsupportedError, match="no attention with a KV cache"):
        attach_kv_cache(torch.nn.Sequential(torch.nn.Linear(16, 16)))
    assert not (tmp_path / "dst").exists()


def test_scales_must_be_calibrated(tmp_path):
    source = saved(llama, tmp_path / "model")
    model = load(source)
    attach(model, QFORMATS["w4a16_nvfp4"])
    with pytest.raises(QuantizerError, match="has no quantizers of keys and values"):
        max_calibrate(model)
        export(model, tmp_path / "dst", source, kv_cache_qformat="fp8")
    attach_kv_cache(model)
    with pytest.raises(UnsupportedError, match="already"):
        attach_kv_cache(model)
    with pytest.raises(QuantizerError, match=r"self_attn\.k_bmm_quantizer: never observed"):
        export(model, tmp_path / "dst", source)
    max_calibrate(model, lambda model: model(TOKENS))
    assert export(model, tmp_path / "dst", source).kv_cache_qformat == "fp8"


@pytest.mark.parametrize(
    ("kv_cache_qformat", "qformat", "sentence"),
    [
        ("fp8", "w4a16_nvfp4", "fp8 needs text to run the model on"),
        ("nvfp4", "w4a16_nvfp4", "--kv_cache_qformat nvfp4: only FP8 .* expected none, fp8 or fp8_cast"),
        ("fp9", "w4a16_nvfp4", "unknown kv_cache_qformat 'fp9'; expected none, fp8 or fp8_cast"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(tmp_path, kv_cache_qformat, qformat, sentence):
    with pytest.raises(UsageError, match=sentence):
        quantize(Options(tmp_path / "no model", tmp_path / "dst", qformat, kv_cache_qformat=kv_cache_qformat))
