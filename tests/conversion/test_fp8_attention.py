"""`--fp8 attention`: the bytes of an independent quantizer, every figure measured, every cast as exact as without."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch as safetensors
import torch

import attention
import fp4cast
from attention import KDA_FP8, MERGED_BADLY, MLA_FP8
from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.conversion.fp8_blocks import Fp8Of, fp8_codes, fp8_scales, to_bf16
from fp4cast.conversion.job_array import convert_part, finish
from fp4cast.conversion.plan import ConvertOptions
from fp4cast.errors import CheckpointError, InexactError, UnsupportedError, UsageError
from fp4cast.verification.fp8_blocks import expected_codes, expected_scales
from helpers import call, edit, interrupted, plain, raw, tree

FP8 = ConvertOptions(fp8="attention")
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return attention.kimi_k3(tmp_path_factory.mktemp("k3") / "src")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """(the destination, the report); read-only by convention."""
    path = tmp_path_factory.mktemp("fp8") / "dst"
    return path, fp4cast.convert(source, path, fp8="attention")


def tensors_of(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in safetensors.load_file(file).items()}


def dequantized(tensors, module):
    """By torch's own E4M3."""
    codes, scales = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"][:, 0, :, 0].double()
    wide = scales.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)
    return codes.double() * wide[:, : codes.shape[1]]


@pytest.mark.filterwarnings("ignore")
def test_codes_and_scales_are_those_of_nvidia_s_quantizer(source, converted):
    """Bit for bit, of every weight; but for blocks of which every scale is zero there, and the codes are NaN."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    before, after, odd = tensors_of(source), tensors_of(converted[0]), 0
    for module in (*KDA_FP8, *MLA_FP8):
        weight = before[f"{module}.weight"]
        theirs, scales = FP8QTensor.quantize(weight, block_sizes={-2: 128, -1: 128})
        codes, stored = after[f"{module}.weight"], after[f"{module}.weight_scale"]
        assert (codes.dtype, stored.dtype, stored.shape) == (
            torch.float8_e4m3fn, torch.float32, (*scales[:, None].shape, 1),
        )  # fmt: skip
        good = scales.float() >= torch.finfo(torch.float32).tiny
        assert torch.equal(stored[:, 0, :, 0][good], scales.float()[good]), module
        assert (stored[:, 0, :, 0][~good] == 1).all()
        wide = good.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)[:, : codes.shape[1]]
        same = codes.view(torch.uint8) == theirs._quantized_data.view(torch.uint8)
        assert same[wide].all(), module
        assert not codes.float()[~wide].any()
        odd += int((~good).sum())
    assert odd == 3  # the traps: zeros, minus zeros, and numbers whose scale no GPU could use


def test_what_is_merged_over_the_edge_of_a_block_stays(source, converted):
    """vLLM 0.32 would give such rows the scales of their neighbours: tests/oracles/test_vllm.py shows it."""
    path, report = converted
    before, after = tensors_of(source), tensors_of(path)
    for name in MERGED_BADLY:
        module = attention.LAYER.format(2) + name
        assert torch.equal(after[f"{module}.weight"], before[f"{module}.weight"])
        assert f"{module}.weight_scale" not in after
    (note,) = (note for note in report.notes if "stays in BF16" in note)
    assert all(name in note for name in MERGED_BADLY)
    assert "fused_qkv_a_g_proj, of which a part ends within a block of 128 rows" in note


def test_the_cast_is_what_it_is_without(source, converted, tmp_path):
    """All other tensors are equal; the report calls the whole not exact, and every cast exact."""
    path, report = converted
    exact = fp4cast.convert(source, tmp_path / "dst")
    assert exact.exact
    assert exact.fp8 == ()
    before, after = tensors_of(tmp_path / "dst"), tensors_of(path)
    touched = {f"{module}{end}" for module in (*KDA_FP8, *MLA_FP8) for end in (".weight", ".weight_scale")}
    assert after.keys() - before.keys() == {name for name in touched if name.endswith("scale")}
    for name in before.keys() - touched:
        assert np.array_equal(raw(tmp_path / "dst", name), raw(path, name)), name
    assert not report.exact
    assert (report.tensors["exact"], report.tensors["inexact"]) == (exact.tensors["cast"], 0)
    assert report.half_blocks == exact.half_blocks


def test_the_snr_of_each_weight_is_in_report_receipt_and_json(source, converted):
    path, report = converted
    before, after = tensors_of(source), tensors_of(path)
    assert sorted(tensor.name for tensor in report.fp8) == sorted([*KDA_FP8, *MLA_FP8])
    for tensor in report.fp8:
        weight = before[f"{tensor.name}.weight"].double()
        error = dequantized(after, tensor.name) - weight
        expected = 10 * np.log10(float((weight**2).sum() / (error**2).sum()))
        assert tensor.snr_db == pytest.approx(expected, rel=1e-9)
        assert 31 < tensor.snr_db < 33
    receipt = json.loads((path / "fp4cast.json").read_text())
    assert receipt["exact"] is False
    assert receipt["fp8"] == report.to_json()["fp8"]


def test_verify_measures_it_again_and_needs_no_receipt(source, converted, tmp_path):
    path, report = converted
    found = fp4cast.verify(source, path)
    assert found.ok
    assert not found.exact
    assert found.fp8 == report.fp8
    alone = shutil.copytree(path, tmp_path / "dst")
    (alone / "fp4cast.json").unlink()
    assert fp4cast.verify(source, alone).fp8 == report.fp8


@pytest.mark.parametrize("how", ["a bit of a code", "a code of NaN", "a scale", "a scale of NaN", "the sign of a zero"])
def test_verify_finds_every_change(source, converted, tmp_path, how):
    path = shutil.copytree(converted[0], tmp_path / "dst")
    codes, scales = f"{Q_PROJ}.weight", f"{Q_PROJ}.weight_scale"
    name, where, value = {
        "a bit of a code": (codes, 255 * 256 + 200, lambda byte: byte ^ 1),
        "a code of NaN": (codes, 255 * 256 + 200, lambda _: 0x7F),
        "a scale": (scales, 12, lambda byte: byte ^ 1),
        "a scale of NaN": (scales, slice(12, 16), lambda _: 0xFF),
        "the sign of a zero": (codes, 3, lambda _: 0x80),
    }[how]
    edit(path, name, lambda data: data.__setitem__(where, value(data[where])))
    report = fp4cast.verify(source, path)
    assert not report.ok
    assert name in {difference.name for difference in report.differences}
    assert re.search(r"codes are others than|scales are others than", str(report.differences[0]))


def test_verify_says_which_code_differs(source, converted, tmp_path):
    path = shutil.copytree(converted[0], tmp_path / "dst")
    edit(path, f"{Q_PROJ}.weight", lambda data: data.__setitem__(255 * 256 + 200, 0x38))
    (difference,) = (d for d in fp4cast.verify(source, path).differences if d.name == f"{Q_PROJ}.weight")
    assert "1 codes are others" in difference.detail
    assert "row 255, column 200: expected " in difference.detail
    assert difference.detail.endswith(", got 1.0")


CONFIGS = {
    "a merged matrix is not listed": lambda layers: layers.pop(Q_PROJ.replace("q_proj", "in_proj_qkvgfab")),
    "another spelling is not listed": lambda layers: layers.pop(Q_PROJ.removeprefix("language_model.")),
    "one is NVFP4": lambda layers: layers.update({Q_PROJ: {"quant_algo": "W4A16_NVFP4", "group_size": 16}}),
    "one is another FP8": lambda layers: layers.update({Q_PROJ: {"quant_algo": "FP8"}}),
    "one that is BF16 is listed": lambda layers: layers.update(
        {attention.LAYER.format(2) + "g_proj": {"quant_algo": "FP8_PB_WO"}}
    ),
    "one is not listed": lambda layers: [layers.pop(name) for name in list(layers) if name.endswith("f_b_proj")],
}


@pytest.mark.parametrize("how", CONFIGS)
def test_verify_reads_the_config_as_engines_do(source, converted, tmp_path, how):
    path = shutil.copytree(converted[0], tmp_path / "dst")
    config = json.loads((path / "config.json").read_text())
    CONFIGS[how](config["quantization_config"]["quantized_layers"])
    (path / "config.json").write_text(json.dumps(config))
    try:
        report = fp4cast.verify(source, path)
    except UnsupportedError as error:
        assert how == "one is another FP8"
        assert "describes no NVFP4 checkpoint" in str(error)
    else:
        assert not report.ok
        assert not report.fp8 or {d.area for d in report.differences} & {"documents", "weights"}


def test_the_config_says_what_nvidia_s_does(converted):
    """The keys that its script writes for vLLM and SGLang: modules, and what they merge, under each spelling."""
    config = json.loads((converted[0] / "config.json").read_text())["quantization_config"]
    beside = json.loads((converted[0] / "hf_quant_config.json").read_text())["quantization"]
    layers = config["quantized_layers"]
    assert (config["quant_algo"], config["quant_method"]) == ("MIXED_PRECISION", "modelopt_mixed")
    fp8 = {name for name, layer in layers.items() if layer == {"quant_algo": "FP8_PB_WO"}}
    assert beside["quantized_layers"] == layers
    assert config["config_groups"]["group_1"] == {"quant_algo": "FP8_PB_WO", "targets": sorted(fp8)}
    merged = {Q_PROJ.replace("q_proj", name) for name in ("in_proj_qkvgfab", "fused_qkvg_proj")}
    expected = {*KDA_FP8, *MLA_FP8, *merged}
    assert fp8 == expected | {name.removeprefix("language_model.") for name in expected}
    assert {layer["quant_algo"] for name, layer in layers.items() if name not in fp8} == {"W4A16_NVFP4"}


def test_parts_jobs_and_interruptions_change_no_byte(source, converted, tmp_path):
    for part in (1, 2):
        convert_part(source, tmp_path / "parts", part, 2, FP8)
    finish(source, tmp_path / "parts", FP8)
    fp4cast.convert(source, tmp_path / "one", fp8="attention", jobs=1)
    interrupted(source, tmp_path / "again", 0.6, fp8="attention")
    fp4cast.convert(source, tmp_path / "again", fp8="attention")
    for name in ("parts", "one", "again"):
        assert tree(tmp_path / name) == tree(converted[0])
    report = fp4cast.convert(source, tmp_path / "one", fp8="attention")
    assert report.bytes["written"] == 0
    assert report.fp8 == converted[1].fp8


def test_small_pieces_of_work_change_no_byte(source, converted, tmp_path, monkeypatch):
    from fp4cast.checkpoints import tiles
    from fp4cast.checkpoints.tiles import Limits

    monkeypatch.setattr(tiles, "LIMITS", Limits(write_bytes=1000, compare_bytes=1000))
    report = fp4cast.convert(source, tmp_path / "dst", fp8="attention")
    assert tree(tmp_path / "dst") == tree(converted[0])
    assert report.fp8 == converted[1].fp8


def test_without_verification_the_figures_are_those_of_writing(source, converted, tmp_path):
    report = fp4cast.convert(source, tmp_path / "dst", fp8="attention", verify=False)
    assert not report.verified
    for measured, again in zip(report.fp8, converted[1].fp8, strict=True):
        assert (measured.name, pytest.approx(again.snr_db)) == (again.name, measured.snr_db)


def test_w4a4_and_a_plain_attention(tmp_path):
    source = attention.qwen3_moe(tmp_path / "src")
    report = fp4cast.convert(source, tmp_path / "dst", fp8="attention", activations="w4a4", input_scales=1.0)
    assert report.ok
    assert len(report.fp8) == 8
    layers = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]["quantized_layers"]
    assert layers["model.layers.1.self_attn.qkv_proj"] == {"quant_algo": "FP8_PB_WO"}


@pytest.mark.filterwarnings("ignore")
def test_verify_judges_what_nvidia_s_script_writes(tmp_path):
    """Its names, and all of the attention in FP8, in its own bytes or rounded otherwise; far ones are wrong."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    source, path = attention.kimi_k3(tmp_path / "src", traps=False), tmp_path / "dst"
    fp4cast.convert(source, path, card=False)
    (path / "fp4cast.json").unlink()
    for name in ("config.json", "hf_quant_config.json"):
        (path / name).write_text((path / name).read_text().replace('"name": "fp4cast"', '"name": "modelopt"'))
    weights = [attention.LAYER.format(1) + name for name in attention.KDA]
    weights += [attention.LAYER.format(2) + name for name in attention.MLA]

    def quantized(change):
        for shard in path.glob("*.safetensors"):
            before = {**safetensors.load_file(source / shard.name)}
            tensors = safetensors.load_file(shard)
            for module in (module for module in weights if f"{module}.weight" in before):
                codes, scales = FP8QTensor.quantize(change(before[f"{module}.weight"]), block_sizes={-2: 128, -1: 128})
                tensors[f"{module}.weight"] = codes._quantized_data.contiguous()
                tensors[f"{module}.weight_scale"] = scales[:, None, :, None].float().contiguous()
            safetensors.save_file(tensors, shard, {"format": "pt"})
        attention.index_anew(path)
        return fp4cast.verify(source, path)

    for change in (lambda weight: weight, lambda weight: weight.float()):
        report = quantized(change)
        assert report.ok, report.differences
        assert len(report.fp8) == len(weights)
        assert not report.exact
    report = quantized(lambda weight: weight.roll(1, 0))
    wrong = {difference.name for difference in report.differences if difference.area == "weights"}
    assert {f"{module}.weight" for module in weights} <= wrong


def test_the_card_is_written_anew(source, converted, tmp_path):
    path = shutil.copytree(converted[0], tmp_path / "dst")
    (path / "README.md").unlink()
    done = call("card", source, path)
    assert done.exit_code == 0, done.output
    assert (path / "README.md").read_bytes() == (converted[0] / "README.md").read_bytes()
    assert "quantized from BF16 to FP8: that is not exact" in (path / "README.md").read_text()


def test_no_way_back(converted, tmp_path):
    with pytest.raises(InexactError, match=r"11 weights were quantized to FP8 beside the cast, as .*self_attn"):
        fp4cast.convert(converted[0], tmp_path / "back", to="mxfp4")
    with pytest.raises(UsageError, match=r"--to mxfp4 knows no .* or --fp8"):
        fp4cast.convert(converted[0], tmp_path / "back", to="mxfp4", fp8="attention")


@pytest.mark.parametrize(
    ("kind", "options", "error", "words"),
    [
        ("gpt-oss", {}, UsageError, "no engine that we ran or read serves gpt-oss with attention in FP8"),
        ("deepseek-v4", {"activations": "w4a4", "input_scales": 1.0}, UsageError, "quantized already, as layers"),
        ("kimi-k3", {"layout": "compressed-tensors"}, UsageError, "--fp8 attention belongs to --layout modelopt"),
        ("moe", {}, UnsupportedError, "q_proj.*: its rows are no whole blocks of 128 weights, which engines refuse"),
        ("dense", {}, UnsupportedError, "it has none that is a matrix in BF16"),
    ],
)
def test_what_no_engine_reads_is_refused(miniatures, tmp_path, kind, options, error, words):
    with pytest.raises(error, match=words):
        fp4cast.convert(miniatures[kind], tmp_path / "dst", fp8="attention", **options)
    assert not list(tmp_path.iterdir())


def test_a_choice_that_is_none_is_refused(miniatures, tmp_path):
    with pytest.raises(UsageError, match="--fp8 must be none or attention, got 'all'"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", fp8="all")


def test_weights_that_are_no_numbers_are_refused_and_nothing_is_published(tmp_path):
    source = attention.kimi_k3(tmp_path / "src")
    edit(source, f"{Q_PROJ}.weight", lambda data: data.view("<u2").__setitem__(130 * 256, 0x7F80))
    with pytest.raises(CheckpointError, match=r"q_proj.weight.*: holds infinity or NaN in the rows from 128 on"):
        fp4cast.convert(source, tmp_path / "dst", fp8="attention")
    assert not (tmp_path / "dst").exists()


def test_the_command_line_says_it(source, tmp_path):
    said = call("convert", source, tmp_path / "dst", "--fp8", "attention")
    assert said.exit_code == 0
    text = plain(said.output)
    assert "not exact: every cast is, but other weights were quantized, too" in text
    assert re.search(r"attention +11 weights quantized to FP8, with an SNR of 31\.4 dB and more", text)
    assert "vllm serve" in text
    dry = call("convert", source, tmp_path / "dry", "--fp8", "attention", "--dry-run", "--json")
    preview = json.loads(dry.stdout)
    assert (preview["exact"], preview["tensors"]["fp8"]) == (False, 11)
    assert not (tmp_path / "dry").exists()
    shards = {name: size for name, size in preview["files"].items() if name.endswith(".safetensors")}
    assert shards == {name: (tmp_path / "dst" / name).stat().st_size for name in shards}
    card = (tmp_path / "dst" / "README.md").read_text()
    assert "--fp8 attention" in card
    assert "Every weight has the value that it had" not in card


def test_the_rounding_is_ml_dtypes_for_every_number():
    """All positive BF16 numbers as weights, under scales of all kinds: quotient, BF16, E4M3, by other libraries."""
    weights = np.arange(0x7F80, dtype=np.uint16)[: 255 * 128].reshape(-1, 128)
    for top in (0x3F80, 0x4123, 0x3E55, 0x0C01):
        rows = weights[(weights.max(axis=1) <= top)][-128:]
        scales = fp8_scales(rows)
        largest = rows.max().view(ml_dtypes.bfloat16)
        assert scales.tolist() == [float((largest.astype(np.float32) / np.float32(448)).astype(ml_dtypes.bfloat16))]
        divided = (rows.view(ml_dtypes.bfloat16).astype(np.float32) / scales[0]).astype(ml_dtypes.bfloat16)
        expected = divided.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        assert np.array_equal(fp8_codes(rows, scales), expected)
        assert np.array_equal(fp8_codes(rows | 0x8000, scales), expected | 0x80)


def test_the_verifier_s_formula_is_the_quantizer_s(source):
    """Two hands: tables and bits there, float64 and significands here."""
    found = open_checkpoint(source).tensors
    rng = np.random.default_rng(3)
    for scale in (1e-36, 1e-3, 1.0, 1e30):
        values = (rng.standard_normal((128, 384)) * scale * np.exp(rng.normal(0, 3, (128, 384)))).astype(np.float32)
        bits = to_bf16(values)
        exact = bits.view(ml_dtypes.bfloat16).astype(np.float64)
        scales = fp8_scales(bits)
        assert np.array_equal(expected_scales(exact), scales)
        codes = fp8_codes(bits, scales).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        assert np.array_equal(expected_codes(exact, np.repeat(scales, 128)), codes)
    step = Fp8Of("x", found[f"{Q_PROJ}.weight"], scales=False)
    with Files() as files:
        assert np.array_equal(
            step.read(1, files).view(np.uint8).reshape(-1), raw(source, f"{Q_PROJ}.weight")[128 * 512 :]
        )
