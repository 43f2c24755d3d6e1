"""Export of models: against what `convert` writes, against ModelOpt's own export, and by loading it again."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import fp4cast
from fp4cast.checkpoints.checksums import checksum_of_path
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.conversion.destination import foreign_files
from fp4cast.errors import (
    CheckpointError,
    DestinationError,
    QuantizerError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from fp4cast.miniatures import make
from fp4cast.ptq import QFORMATS, apply_to_model, attach, export, max_calibrate
from fp4cast.ptq.model_weights import input_amax
from fp4cast.ptq.modules import quantized_weights
from fp4cast.verification.opened import open_both
from fp4cast.verification.receipt import Receipt, weight_digest
from helpers import contents, edit
from models import (
    load_gpt_oss,
    spoil,
    static,
    tensors,
)

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
TOKENS = torch.arange(64)[None] % 256


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make("gpt-oss", tmp_path_factory.mktemp("export") / "gpt-oss")


def quantized(path, qformat, static=True):
    model = load_gpt_oss(path)
    attach(model, QFORMATS[qformat], static=static)
    max_calibrate(model, lambda model: model(TOKENS))
    return model


@pytest.mark.parametrize("qformat", ["nvfp4_mlp_only", "nvfp4_experts_only"])
def test_a_cast_model_s_directory_is_the_one_that_convert_writes(source, tmp_path, qformat):
    model = quantized(source, qformat)
    lossless = [name.removesuffix("_weight_quantizer") for name in apply_to_model(model, source)]
    exported = export(model, tmp_path / "model", source, lossless=lossless)
    fp4cast.convert(source, tmp_path / "file", activations="w4a4", input_scales=input_amax(model))
    assert contents(tmp_path / "model") == contents(tmp_path / "file")
    assert fp4cast.verify(source, tmp_path / "model").ok
    assert exported.tensors == {"quantized": 4, "exact": 4, "inexact": 0, "copied": 33}
    assert exported.activations == "w4a4" and not exported.inexact
    assert exported.bytes["written"] == sum(path.stat().st_size for path in tmp_path.glob("model/*.safetensors"))


def test_weights_only(source, tmp_path):
    model = quantized(source, "nvfp4_mlp_weight_only")
    apply_to_model(model, source)
    export(model, tmp_path / "model", source)
    fp4cast.convert(source, tmp_path / "file")
    assert contents(tmp_path / "model") == contents(tmp_path / "file")


def test_what_is_not_cast_is_measured(source, tmp_path):
    exported = export(quantized(source, "nvfp4_mlp_only"), tmp_path / "uncast", source)
    assert exported.tensors == {"quantized": 4, "exact": 0, "inexact": 4, "copied": 33}
    assert all(10 < tensor.snr_db < 40 for tensor in exported.inexact)
    report = fp4cast.verify(source, tmp_path / "uncast")
    assert report.ok and not report.exact and report.tensors["inexact"] == 4
    assert any("4 of 4 MXFP4 tensors are no casts but quantized from values" in note for note in report.notes)
    assert json.loads(json.dumps(exported.to_json()))["tensors"]["inexact"] == 4


def test_what_is_said_to_be_no_cast_is_still_what_was_written(source, tmp_path):
    """Another byte is found by the digest; weights of another model by their error, whatever the receipt says."""
    export(quantized(source, "nvfp4_mlp_only"), tmp_path / "dst", source)
    name = "model.layers.1.mlp.experts.down_proj"
    shutil.copytree(tmp_path / "dst", tmp_path / "byte")
    edit(tmp_path / "byte", name, lambda codes: codes.__setitem__(5, codes[5] ^ 1))
    report = fp4cast.verify(source, tmp_path / "byte")
    assert name in {difference.name for difference in report.wrong("weights")}
    edit(tmp_path / "dst", name, lambda codes: np.random.default_rng(0).shuffle(codes))
    forge(source, tmp_path / "dst", name)
    report = fp4cast.verify(source, tmp_path / "dst")
    assert [each.detail for each in report.wrong("weights")] == [
        "is said to be quantized from the source's values, but they are less than 10 dB above its error"
    ]


def test_a_quantized_weight_of_something_else_is_found(source, tmp_path):
    """Attention that the source holds in BF16."""
    export(quantized(source, "nvfp4"), tmp_path / "dst", source)
    assert fp4cast.verify(source, tmp_path / "dst").ok
    name = "model.layers.1.self_attn.v_proj.weight"
    edit(tmp_path / "dst", name, lambda codes: np.random.default_rng(0).shuffle(codes))
    wrong = fp4cast.verify(source, tmp_path / "dst").wrong("weights")
    assert [(each.name, "less than 10 dB" in each.detail) for each in wrong] == [(name, True)]


def forge(source, destination, name):
    """A receipt that calls the weights of a module those that were written."""
    receipt = Receipt.read(destination)
    target = open_both(source, destination, "config.json").target
    written = open_checkpoint(destination).tensors
    inexact = [each.to_json() for each in fp4cast.verify(source, destination).inexact]
    digests = {**receipt.digests, name: weight_digest(target.names(name), written)}
    facts = {**receipt.facts, "inexact": inexact}
    files = {each: checksum_of_path(destination / each) for each in receipt.files}
    (destination / "fp4cast.json").write_bytes(replace(receipt, facts=facts, digests=digests, files=files).to_bytes())


def test_a_nearest_cast_passes_as_that_of_convert_does(source, tmp_path):
    """The rounded tensor is a cast, held against the least error, and no exception."""
    path = Path(shutil.copytree(source, tmp_path / "src"))
    spoil(path, "model.layers.0.mlp.experts.down_proj", spread=20)
    model = quantized(path, "nvfp4_mlp_only")
    cast = [name.removesuffix("_weight_quantizer") for name in apply_to_model(model, path, inexact="nearest")]
    export(model, tmp_path / "dst", path, cast=cast)
    report = fp4cast.verify(path, tmp_path / "dst")
    assert report.ok and report.tensors["inexact"] == 1 and not any("no casts" in note for note in report.notes)


def test_attention_is_quantized_beside_cast_experts(source, tmp_path):
    model = quantized(source, "nvfp4")
    apply_to_model(model, source)
    exported = export(model, tmp_path / "all", source)
    assert exported.tensors["quantized"] == 4 + 8 and exported.tensors["inexact"] == 0
    report = fp4cast.verify(source, tmp_path / "all")
    assert report.ok and not report.exact and report.tensors == {"cast": 4, "exact": 4, "inexact": 0, "copied": 25}
    assert any("8 weights that the source does not hold in MXFP4 are quantized by" in note for note in report.notes)
    written = tensors(tmp_path / "all")
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{leaf}"
        assert written[f"{name}.weight"].dtype == torch.uint8
        assert written[f"{name}.input_scale"].shape == () and written[f"{name}.bias"].dtype == torch.bfloat16
    fused = {
        written[f"model.layers.0.self_attn.{leaf}.weight_scale_2"].item() for leaf in ("q_proj", "k_proj", "v_proj")
    }
    assert len(fused) == 1
    ignored = json.loads((tmp_path / "all/config.json").read_text())["quantization_config"]["ignore"]
    assert not any("self_attn" in name or "experts" in name for name in ignored) and "lm_head" in ignored


def test_part_of_attention(source, tmp_path):
    model = quantized(source, "nvfp4_omlp_only")
    export(model, tmp_path / "dst", source)
    ignored = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]["ignore"]
    assert {name for name in ignored if "self_attn" in name} == {
        f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "k_proj", "v_proj")
    }


# --- ModelOpt ---------------------------------------------------------------------------------------------------------


def peer(source, out, qformat, cast):
    """ModelOpt's own quantization, calibration and export of the same model and data."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    rules = {"nvfp4": mtq.NVFP4_DEFAULT_CFG, "nvfp4_mlp_only": mtq.NVFP4_MLP_ONLY_CFG}[qformat]
    model = load_gpt_oss(source)
    mtq.quantize(model, static(rules, False) if cast else rules, lambda model: model(TOKENS))
    if cast:
        pin(model, source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_hf_checkpoint(model, export_dir=out)
    return tensors(out)


def pin(model, source):
    """The closed form by torch alone, which holds where every block is inside of the window."""
    for name, scales in tensors(source).items():
        if name.endswith("_scales"):
            k = scales.float() - 127
            quantizer = model.get_submodule(name.removesuffix("_scales") + "_weight_quantizer")
            quantizer.global_amax = torch.tensor(6 * 448 * 2.0 ** (k.max().item() - 8))
            quantizer._amax.copy_((6 * 2.0**k).repeat_interleave(2, dim=-1).reshape(quantizer._amax.shape))


@pytest.mark.parametrize("cast", [True, False], ids=["cast", "uncast"])
@pytest.mark.parametrize("qformat", ["nvfp4_mlp_only", "nvfp4"])
def test_an_export_equals_modelopt_s(tmp_path, qformat, cast):
    source = make("gpt-oss", tmp_path / "src", traps=False)
    theirs = peer(source, tmp_path / "peer", qformat, cast)
    model = quantized(source, qformat, static=cast)
    if cast:
        apply_to_model(model, source)
    export(model, tmp_path / "ours", source)
    ours = tensors(tmp_path / "ours")
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    for name, expected in theirs.items():
        np.testing.assert_array_equal(without_minus_zero(ours[name]), without_minus_zero(expected), err_msg=name)


def without_minus_zero(tensor):
    """A tensor's bytes; of packed codes, with code 8 as 0: for zeros, ModelOpt keeps no sign."""
    stored = tensor.reshape(-1).view(torch.uint8)
    if tensor.dtype != torch.uint8:
        return stored
    low, high = stored & 0x0F, stored & 0xF0
    return torch.where(low == 8, 0, low) | torch.where(high == 0x80, 0, high)


# --- models without batched experts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense") / "llama"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="60kB")
    return path


def quantized_dense(path, qformat="nvfp4", **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    attach(model, QFORMATS[qformat], **options)
    max_calibrate(model, lambda model: model(TOKENS))
    return model


def test_compressed_tensors_reads_what_the_quantizers_hold(dense, tmp_path):
    model = quantized_dense(dense, "w4a16_nvfp4", static=True)
    exported = export(model, tmp_path / "dst", dense, layout="compressed-tensors")
    assert exported.tensors == {"quantized": 14, "exact": 0, "inexact": 0, "copied": 6}
    config = transformers.CompressedTensorsConfig(run_compressed=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst", quantization_config=config)
    for name, quantizer, weight in quantized_weights(model):
        assert torch.equal(again.get_parameter(name), quantizer(weight)), name
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("kept", [True, False])
def test_a_dense_model_equals_modelopt_s(dense, tmp_path, kept):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    rules = mtq.NVFP4_DEFAULT_CFG
    mtq.quantize(model, static(rules, False) if kept else rules, lambda model: model(TOKENS))
    export_hf_checkpoint(model, export_dir=tmp_path / "peer")
    theirs = tensors(tmp_path / "peer")
    export(quantized_dense(dense, static=kept), tmp_path / "ours", dense)
    ours = tensors(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_array_equal(without_minus_zero(ours[name]), without_minus_zero(expected), err_msg=name)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(model, tmp_path, source, error, words, **options):
    with pytest.raises(error, match=words):
        export(model, tmp_path / "dst", source, **options)
    assert not (tmp_path / "dst").exists()


def test_nothing_quantized(source, tmp_path):
    refused(load_gpt_oss(source), tmp_path, source, QuantizerError, "no weight is quantized")


def test_an_input_that_was_not_calibrated(source, tmp_path):
    model = load_gpt_oss(source)
    attach(model, QFORMATS["nvfp4_mlp_only"], static=True)
    max_calibrate(model)
    refused(model, tmp_path, source, QuantizerError, "layers.0.mlp.experts.gate_up_proj: its input was never observed")


def test_some_inputs_quantized_and_some_not(source, tmp_path):
    model = quantized(source, "nvfp4_mlp_only")
    model.model.layers[1].mlp.experts.down_proj_input_quantizer.disable()
    words = "layers.1.mlp.experts.down_proj: its input is not calibrated, but that of 3 others is"
    refused(model, tmp_path, source, QuantizerError, words)


def test_weights_that_were_not_calibrated(source, tmp_path):
    model = load_gpt_oss(source)
    attach(model, QFORMATS["w4a16_nvfp4"])
    refused(model, tmp_path, source, QuantizerError, "was not calibrated")


def test_mxfp4_that_would_stay(source, tmp_path):
    model = quantized(source, "nvfp4_mlp_only")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj_weight_quantizer.disable()
    refused(model, tmp_path, source, UnsupportedError, "1 of 4 MXFP4 tensors are not .*layers.1.mlp.experts.down_proj")


def test_another_checkpoint(source, dense, tmp_path):
    refused(
        quantized(source, "nvfp4_mlp_only"), tmp_path, dense, QuantizerError, "gate_up_proj: is not a tensor of .*llama"
    )
    model = quantized_dense(dense, "w4a16_nvfp4")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight[:64])
    max_calibrate(model)
    refused(model, tmp_path, dense, QuantizerError, r"up_proj.weight: expected .* \[64, 64\] in .*\[96, 64\]")


def test_a_model_that_was_trained_since(dense, tmp_path):
    model = quantized_dense(dense)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    refused(model, tmp_path, dense, CheckpointError, "model.norm.weight is not what the model holds. Save the model")


def test_a_cast_that_was_undone(source, tmp_path):
    model = quantized(source, "nvfp4_mlp_only")
    lossless = [name.removesuffix("_weight_quantizer") for name in apply_to_model(model, source)]
    quantizer = model.model.layers[1].mlp.experts.down_proj_weight_quantizer
    quantizer.amax[5] *= 1.3
    words = (
        "1 of 4 weights .* the first is model.layers.1.mlp.experts.down_proj .1 half-blocks, SNR .* dB.; nothing was"
    )
    refused(model, tmp_path, source, VerificationError, words, lossless=lossless)


def test_a_layout_that_batched_experts_do_not_have(source, tmp_path):
    model = quantized(source, "nvfp4_mlp_only")
    refused(model, tmp_path, source, UsageError, "--layout modelopt", layout="compressed-tensors")


def test_a_destination_that_is_there(source, tmp_path):
    model = quantized(source, "nvfp4_mlp_only")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst/mine").write_text("kept")
    with pytest.raises(DestinationError, match="did not write: mine"):
        export(model, tmp_path / "dst", source, overwrite=True)
    assert (tmp_path / "dst/mine").read_text() == "kept"
    (tmp_path / "dst/mine").unlink()
    export(model, tmp_path / "dst", source)
    with pytest.raises(DestinationError, match="--overwrite"):
        export(model, tmp_path / "dst", source)
    before = (tmp_path / "dst/LICENSE").read_bytes()
    (tmp_path / "dst/LICENSE").write_text("edited")
    with pytest.raises(DestinationError, match="changed since fp4cast wrote them: LICENSE"):
        export(model, tmp_path / "dst", source, overwrite=True)
    (tmp_path / "dst/LICENSE").write_bytes(before)
    export(model, tmp_path / "dst", source, overwrite=True)
    assert (tmp_path / "dst/LICENSE").read_text() != "older"
    assert list(foreign_files(tmp_path / "dst", Receipt.read(tmp_path / "dst"))) == []
