"""`verify` proves casts that other tools have written, without a receipt; what is wrong in them is found."""

import json
import shutil
import warnings

import pytest
from test_libraries import load, modelopt_source, pairs_of, peer_export

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.families.recognise import read_source
from helpers import call, flip, plain
from models import static

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="the oracles need torch: ./dev test installs them")

CONFIG, BESIDE = "config.json", "hf_quant_config.json"


def dense_by_modelopt(source, out):
    """A Llama, loaded as BF16 with the MXFP4 values, quantized by nvidia-modelopt under pinned scales, and exported."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = json.loads((source / CONFIG).read_text())
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.bfloat16)
    pairs, _ = pairs_of(source)
    state = {name: load(source, name) for name in model.state_dict() if name in names_of(source)}
    state |= {f"{pair.module}.weight": modelopt_source(pair, source).to(torch.bfloat16) for pair, _ in pairs}
    model.load_state_dict(state)
    mtq.quantize(model, static(mtq.NVFP4_DEFAULT_CFG, False), lambda m: m(torch.arange(64)[None] % 256))
    domains = {pair.module: domain for domain in fp4cast.inspect(source).domains for pair in domain.pairs}
    for pair, _ in pairs:
        quantizer = model.get_submodule(pair.module).weight_quantizer
        quantizer.global_amax = torch.tensor(6 * 448 * 2.0 ** domains[pair.module].scaling.m)
        k = load(source, pair.scales.name).double() - 127
        quantizer._amax.copy_((6 * 2.0**k).repeat_interleave(2, dim=-1).reshape(quantizer._amax.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_hf_checkpoint(model, export_dir=out)


def names_of(path):
    return open_checkpoint(path).tensors


def compressed(source, out):
    """What llm-compressor saves: compressed-tensors' own compressor, and its config with every argument."""
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from safetensors.torch import save_file

    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    domains = {pair.module: domain for domain in fp4cast.inspect(source).domains for pair in domain.pairs}
    pairs, _ = pairs_of(source, "compressed-tensors")
    state = {name: load(source, name) for name in names_of(source)}
    for pair, _ in pairs:
        scales = state.pop(pair.scales.name)
        del state[pair.codes.name]
        scale = torch.tensor([2.0 ** -domains[pair.module].scaling.m])
        weight = {
            "weight": modelopt_source(pair, source).to(torch.bfloat16),
            "weight_scale": (2.0 ** (scales.double() - 127)).repeat_interleave(2, dim=-1).float() * scale,
            "weight_global_scale": scale,
        }
        found = NVFP4PackedCompressor.compress(weight, scheme)
        state |= {f"{pair.module}.{name}": tensor.contiguous() for name, tensor in found.items()}
    out.mkdir()
    save_file(state, out / "model.safetensors", {"format": "pt"})
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format="nvfp4-pack-quantized"
    )
    config = json.loads((source / CONFIG).read_text())
    config["quantization_config"] = quantization.to_dict() | {"quantization_status": "compressed"}
    (out / CONFIG).write_text(json.dumps(config))


def tensorrt_llm(source, out):
    """What TensorRT-LLM reads: nothing in config.json, all in hf_quant_config.json, as ModelOpt's older exports are.

    The weights are `convert`'s; the spelling is that of https://huggingface.co/nvidia's checkpoints.
    """
    fp4cast.convert(source, out, activations="w4a4", input_scales=1.0)
    for name in ("fp4cast.json", "README.md", "README.svg"):
        (out / name).unlink()
    config = json.loads((out / CONFIG).read_text())
    del config["quantization_config"]
    (out / CONFIG).write_text(json.dumps(config))
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    document = {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": quantization}
    (out / BESIDE).write_text(json.dumps(document))


def gpt_oss_by_modelopt(source, out):
    """ModelOpt's own export of gpt-oss, as banks."""
    peer_export(source, out, "w4a4")


CASTS = {
    "gpt-oss by modelopt": ("gpt-oss", gpt_oss_by_modelopt, "modelopt", "down_proj_weight_scale"),
    "dense by modelopt": ("dense", dense_by_modelopt, "modelopt", "down_proj.weight_scale"),
    "dense by compressed-tensors": ("dense", compressed, "compressed-tensors", "down_proj.weight_scale"),
    "dense for TensorRT-LLM": ("dense", tensorrt_llm, "modelopt", "down_proj.weight_scale"),
}


@pytest.fixture(scope="module", params=CASTS)
def foreign(request, plain_miniatures, tmp_path_factory):
    """(MXFP4, another tool's cast of it, its layout, the end of the name of some block scales)."""
    kind, make, layout, name = CASTS[request.param]
    out = tmp_path_factory.mktemp("foreign") / "nvfp4"
    make(plain_miniatures[kind], out)
    return plain_miniatures[kind], out, layout, name


def test_its_weights_are_proved_and_the_rest_is_listed(foreign):
    source, out, layout, _ = foreign
    report = fp4cast.verify(source, out)
    assert report.ok and report.layout == layout
    assert all(tensor.max_abs_error == 0 for tensor in report.inexact)
    assert {difference.area for difference in report.differences} == {"companions"}
    assert "metadata" in {difference.kind for difference in report.differences}
    assert any("made DST" in note for note in report.notes)
    assert not fp4cast.verify(source, out, strict=True).ok
    found = call("verify", source, out)
    assert found.exit_code == 0
    # What ModelOpt's and compressed-tensors' quantizers write for -0 is equal as a number alone.
    assert report.exact or "zeros of the other sign" in plain(found.output)


def test_the_way_back_has_the_same_values(foreign, tmp_path):
    source, out, *_ = foreign
    report = fp4cast.convert(out, tmp_path / "back", to="mxfp4")
    assert report.exact and report.original is None
    for module in (pair.module for pair, _ in pairs_of(source)[0]):
        pair, back = (read_source(open_checkpoint(path)).pairs[module] for path in (source, tmp_path / "back"))
        assert torch.equal(modelopt_source(pair, source), modelopt_source(back, tmp_path / "back"))
        assert torch.equal(load(source, pair.scales.name), load(tmp_path / "back", back.scales.name))


@pytest.mark.parametrize("what", ["scale", "code", "copied", "missing"])
def test_what_is_wrong_with_it_is_found(foreign, tmp_path, what):
    source, out, _, name = foreign
    copy = shutil.copytree(out, tmp_path / "copy")
    tensors = names_of(copy)
    scales = next(each for each in sorted(tensors) if each.endswith(name))
    codes = scales.removesuffix("_weight_scale") if "experts" in scales else scales.removesuffix("_scale")
    codes = codes if codes in tensors else f"{codes}_packed"
    wrong = {"scale": scales, "code": codes, "copied": "model.norm.weight", "missing": "model.norm.weight"}[what]
    if what == "missing":
        for path in copy.glob("*.safetensors"):
            path.write_bytes(path.read_bytes().replace(b'"model.norm.weight"', b'"model.norm.weighs"'))
        for index in copy.glob("*.index.json"):
            index.write_text(index.read_text().replace("model.norm.weight", "model.norm.weighs"))
    else:
        flip(tensors[wrong], 8 * 5 + 6 if what == "scale" else 8 * 5 + 1)
    report = fp4cast.verify(source, copy)
    assert not report.ok
    assert {difference.name for difference in report.wrong("weights")} & {wrong, codes}


def test_a_conversion_without_its_receipt_is_no_foreign_cast(miniatures, tmp_path):
    """A changed document of ours stays a failure."""
    fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    (tmp_path / "dst" / "fp4cast.json").unlink()
    beside = tmp_path / "dst" / BESIDE
    beside.write_text(beside.read_text().replace('"fp4cast"', '"modelopt"'))
    assert not fp4cast.verify(miniatures["dense"], tmp_path / "dst").ok
