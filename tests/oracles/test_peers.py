"""The eleven mistakes of the peers, each reproduced elsewhere and not made here."""

import json
import shutil

import numpy as np
import pytest

import fp4cast
import truth
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import CheckpointError, IndexFileError, ScaleError, UnsupportedError
from fp4cast.families.recognise import read_source
from helpers import edit, flip, interrupted, lossy, raw, scalar, tree


def test_mistake_01_no_match_is_an_error_not_a_success(tmp_path):
    bf16 = {"model.norm.weight": ("BF16", np.ones(8, np.uint16))}
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": bf16}, {})
    with pytest.raises(UnsupportedError, match="no MXFP4 weights"):
        fp4cast.convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_mistake_02_a_zero_block_with_byte_200_does_not_zero_the_tensor(plain_miniatures, tmp_path):
    source = shutil.copytree(plain_miniatures["gpt-oss"], tmp_path / "src")
    module = "model.layers.0.mlp.experts.gate_up_proj"
    before = fp4cast.convert(source, tmp_path / "before")
    edit(source, f"{module}_blocks", lambda data: data.__setitem__(slice(16 * 5, 16 * 6), 0))
    edit(source, f"{module}_scales", lambda data: data.__setitem__(5, 200))
    after = fp4cast.convert(source, tmp_path / "after")
    assert before.exact
    assert after.exact
    scale = f"{module}_weight_scale_2"
    assert scalar(tmp_path / "after", scale) == scalar(tmp_path / "before", scale)


def test_mistake_03_byte_0_with_codes_is_a_value_not_zero():
    codes, scales = np.full((3, 16), 0x32, np.uint8), np.array([[0], [1], [17]], np.uint8)
    out = fp4cast.cast(codes, scales)
    values = truth.nvfp4(out.codes, out.block_scales, out.tensor_scale)
    assert values == truth.mxfp4(codes, scales)
    assert values[0][0] == truth.power(-127)
    with pytest.raises(fp4cast.Fp4CastError):  # 18 binades below, with codes that leave no room: said, not zeroed
        fp4cast.cast(np.full((2, 16), 0x71, np.uint8), np.array([[0], [18]], np.uint8))


def test_mistake_04_byte_255_raises():
    with pytest.raises(ScaleError, match="NaN"):
        fp4cast.cast(np.zeros((1, 16), np.uint8), np.array([[255]], np.uint8))


@pytest.mark.parametrize("kind", ["gpt-oss", "moe"])
def test_mistake_05_minus_zero_survives(miniatures, converted, kind):
    source = read_source(open_checkpoint(miniatures[kind]))
    pair = next(iter(source.pairs.values()))
    name = pair.module if kind == "gpt-oss" else f"{pair.module}.weight"

    def minus_zeros(path, tensor):
        return sum(nibble == 8 for nibble in truth.nibbles(raw(path, tensor)))

    assert minus_zeros(miniatures[kind], pair.codes.name) == minus_zeros(converted[kind], name) > 0


def test_mistake_06_zero_blocks_and_shiftable_blocks_are_exact_and_counted_so():
    codes = np.stack([np.full(16, c, np.uint8) for c in (0x71, 0x00, 0x75, 0x88)])
    scales = np.array([[125], [90], [107], [254]], np.uint8)
    out = fp4cast.cast(codes, scales)
    assert (out.exact, out.shifted, out.rounded) == (True, 2, 0)
    assert truth.nvfp4(out.codes, out.block_scales, out.tensor_scale) == truth.mxfp4(codes, scales)


def test_mistake_07_w1_and_w3_in_different_shards_share_a_tensor_scale(miniatures, converted):
    source = read_source(open_checkpoint(miniatures["kimi-k3"]))
    at = "language_model.model.layers.1.block_sparse_moe.experts.3"
    assert source.pairs[f"{at}.w1"].codes.path != source.pairs[f"{at}.w3"].codes.path
    tops = [int(raw(miniatures["kimi-k3"], f"{at}.{leaf}.weight_scale")[1:-5].max()) for leaf in ("w1", "w3")]
    assert tops[0] != tops[1], "alone, each would take another scale"
    scales = [scalar(converted["kimi-k3"], f"{at}.{leaf}.weight_scale_2") for leaf in ("w1", "w3")]
    assert scales[0] == scales[1]


def test_mistake_08_exactness_is_measured_on_what_was_written(miniatures, converted, tmp_path):
    destination = shutil.copytree(converted["moe"], tmp_path / "dst")
    codes = next(t for t in open_checkpoint(destination).tensors.values() if t.dtype == "U8")
    flip(codes, 0)
    report = fp4cast.verify(miniatures["moe"], destination)  # the exponents, and the receipt, still say "exact"
    assert not report.exact
    assert report.tensors["inexact"] == 1


def test_mistake_09_total_size_is_true_and_a_partial_output_cannot_be_loaded(miniatures, tmp_path):
    interrupted(miniatures["moe"], tmp_path / "dst", 0.6)
    assert not (tmp_path / "dst").exists()
    assert not list(tmp_path.rglob("config.json"))
    fp4cast.convert(miniatures["moe"], tmp_path / "dst", resume=True)
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    before = json.loads((miniatures["moe"] / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == open_checkpoint(tmp_path / "dst").total_size
    assert index["metadata"]["total_size"] != before["metadata"]["total_size"]


def test_mistake_10_untrusted_input_is_checked_by_exceptions_and_runs_resume(miniatures, converted, tmp_path):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../../x"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IndexFileError, match="same directory") as error:
        fp4cast.convert(source, tmp_path / "dst")
    assert isinstance(error.value, CheckpointError)
    interrupted(miniatures["moe"], tmp_path / "dst", 0.5)
    fp4cast.convert(miniatures["moe"], tmp_path / "dst", resume=True)
    assert tree(tmp_path / "dst") == tree(converted["moe"])


def test_mistake_11_names_that_an_engine_would_not_match_are_found(miniatures, converted, tmp_path):
    destination = shutil.copytree(converted["moe"], tmp_path / "dst")
    config = json.loads((destination / "config.json").read_text())
    layers = config["quantization_config"]["quantized_layers"]
    config["quantization_config"]["quantized_layers"] = {name.replace("mlp", "ffn"): v for name, v in layers.items()}
    (destination / "config.json").write_text(json.dumps(config))
    report = fp4cast.verify(miniatures["moe"], destination)
    assert any("expected it to be NVFP4" in difference.detail for difference in report.differences)


def test_mistake_08_again_errors_are_measured_not_inferred(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    report = fp4cast.convert(source, tmp_path / "dst", inexact="nearest")
    assert report.inexact[0].mse > 0
    assert not report.exact
