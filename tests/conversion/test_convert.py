"""The main job on every family: names, bytes, configs, and a destination that is never half there."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.checkpoints.tiles import Limits
from fp4cast.conversion import convert as converting
from fp4cast.conversion import execute as executing
from fp4cast.errors import (
    CheckpointError,
    DestinationError,
    InexactError,
    ScaleError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from fp4cast.families.recognise import read_source
from helpers import DEEPSEEK, VARIANTS, edit, interrupted, lossy, older, options, raw, scalar, tree


@pytest.mark.parametrize(("kind", "layout", "activations"), VARIANTS)
def test_every_family_in_every_layout_is_exact(miniatures, tmp_path, kind, layout, activations):
    scales = 1.0 if activations == "w4a4" else None
    report = fp4cast.convert(
        miniatures[kind], tmp_path / "dst", layout=layout, activations=activations, input_scales=scales
    )
    assert report.ok
    assert report.exact
    assert report.verified
    assert report.half_blocks["rounded"] == 0
    assert report.half_blocks["shifted"] > 0, "the miniature plants blocks that need a shift"
    assert report.tensors["exact"] == report.tensors["cast"]
    checkpoint = open_checkpoint(tmp_path / "dst")
    with_input = [name for name in checkpoint.tensors if "input_" in name and "layernorm" not in name]
    assert len(with_input) == (report.tensors["cast"] if activations == "w4a4" else 0)
    for shard in checkpoint.shards:
        with safetensors.safe_open(tmp_path / "dst" / shard, "np") as file:
            assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("kind", mini.KINDS)
def test_what_is_not_cast_is_byte_equal(miniatures, converted, kind):
    source = read_source(open_checkpoint(miniatures[kind]))
    pairs = [pair for pair in source.pairs.values() if not pair.module.startswith("mtp.")]
    cast = {name for pair in pairs for name in (pair.codes.name, pair.scales.name)}
    for name, tensor in source.checkpoint.tensors.items():
        if name not in cast:
            ours = open_checkpoint(converted[kind]).tensors[name]
            assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
            np.testing.assert_array_equal(raw(converted[kind], name), raw(miniatures[kind], name))


def test_verbatim_codes_are_the_same_bytes(plain_miniatures, tmp_path):
    fp4cast.convert(plain_miniatures["kimi-k3"], tmp_path / "dst")
    for module, pair in read_source(open_checkpoint(plain_miniatures["kimi-k3"])).pairs.items():
        before, after = raw(plain_miniatures["kimi-k3"], pair.codes.name), raw(tmp_path / "dst", f"{module}.weight")
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("kind", mini.KINDS)
def test_companions_travel_and_other_formats_do_not(converted, kind):
    names = {str(path.relative_to(converted[kind])) for path in converted[kind].rglob("*") if path.is_file()}
    assert {"LICENSE", "encoding/tokens.py", "generation_config.json", "fp4cast.json"} <= names
    assert not [name for name in names if name.startswith(("original", "metal", "."))]


@pytest.mark.parametrize("kind", mini.KINDS)
def test_the_index_has_the_true_size(converted, kind):
    index = json.loads((converted[kind] / "model.safetensors.index.json").read_text())
    sizes = [tensor.nbytes for tensor in open_checkpoint(converted[kind]).tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize(("kind", "layout", "activations"), VARIANTS[::3])
def test_bytes_do_not_depend_on_workers_or_verification(miniatures, tmp_path, kind, layout, activations):
    scales = 1.0 if activations == "w4a4" else None
    for name, extra in {"one": {"jobs": 1}, "many": {"jobs": 7}, "plain": {"verify": False}}.items():
        fp4cast.convert(
            miniatures[kind],
            tmp_path / name,
            layout=layout,
            activations=activations,
            input_scales=scales,
            **extra,
        )
    assert tree(tmp_path / "one") == tree(tmp_path / "many") == tree(tmp_path / "plain")


@pytest.mark.parametrize("tile_bytes", [1, 7 * 48])
def test_tiles_do_not_change_a_byte(miniatures, converted, tmp_path, monkeypatch, tile_bytes):
    small = Limits(
        write_bytes=100,
        compare_bytes=100,
        tile_bytes=tile_bytes,
        tile_rows=5,
        band_rows=3,
        scan_bytes=5,
        scale_blocks=64,
        compare_blocks=3,
        copy_bytes=48,
    )
    monkeypatch.setattr(tiles, "LIMITS", small)
    for kind in ("gpt-oss", "moe"):
        fp4cast.convert(miniatures[kind], tmp_path / kind)
        assert tree(tmp_path / kind) == tree(converted[kind])


def test_a_single_file_stays_a_single_file(tmp_path):
    codes, scales = mini.mxfp4(np.random.default_rng(0), (8, 64))
    tensors = {
        "lm.up_proj.weight_packed": ("U8", codes.reshape(8, -1)),
        "lm.up_proj.weight_scale": ("U8", scales),
        "lm.norm.weight": ("BF16", np.ones(8, np.uint16)),
    }
    source = tmp_path / "src"
    mini.write_checkpoint(source, {"model.safetensors": tensors}, {})
    (source / "model.safetensors.index.json").unlink()
    assert fp4cast.convert(source, tmp_path / "dst").exact
    assert not (tmp_path / "dst" / "model.safetensors.index.json").exists()


# --- what must not be written -----------------------------------------------------------------------------------------


def test_an_inexact_domain_fails_before_a_byte_is_written(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    with pytest.raises(InexactError) as error:
        fp4cast.convert(source, tmp_path / "dst")
    message = str(error.value)
    assert re.search(r"model\.layers\.0\.mlp\.experts\.0\.down_proj: exponents -\d+ to -?\d+, a spread of 18", message)
    assert "block 0 of" in message
    assert "block 1 of" in message
    assert "--inexact nearest" in message
    (tensor,) = fp4cast.convert(source, tmp_path / "dst", inexact="nearest").inexact
    shutil.rmtree(tmp_path / "dst")
    assert tensor.rounded_half_blocks == 2  # both of one block
    cost = re.search(r"nearest would round 1 of its 192 blocks: SNR of these (\S+) dB, largest error (\S+)", message)
    assert cost and float(cost[2]) == pytest.approx(tensor.max_abs_error, rel=0.01)
    assert 0 < float(cost[1]) < tensor.snr_db  # of the rounded block alone
    assert "1 of the 4,608 blocks that are cast would change" in message
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_nearest_reports_what_was_measured(miniatures, tmp_path, layout):
    source = lossy(miniatures, tmp_path)
    report = fp4cast.convert(source, tmp_path / "dst", inexact="nearest", layout=layout)
    assert report.ok
    assert not report.exact
    assert report.tensors == {"cast": 24, "exact": 23, "inexact": 1, "copied": 21}
    (tensor,) = report.inexact
    assert tensor.name == "model.layers.0.mlp.experts.0.down_proj"
    assert tensor.rounded_half_blocks == report.half_blocks["rounded"] == 2
    assert 0 < tensor.max_abs_error < 1e-5
    assert tensor.snr_db > 60
    unread = fp4cast.convert(source, tmp_path / "unread", inexact="nearest", layout=layout, verify=False)
    assert unread.facts()["half_blocks"] == report.facts()["half_blocks"]
    (again,) = unread.inexact
    assert (again.mse, again.max_abs_error, again.snr_db) == pytest.approx(
        (tensor.mse, tensor.max_abs_error, tensor.snr_db), rel=1e-12
    )
    assert tree(tmp_path / "dst") == tree(tmp_path / "unread")


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_a_continuous_scale_is_measured_as_a_reader_sees_it(tmp_path, layout):
    """One extreme outlier: the tensor scale is no power of two, and its reciprocal is rounded to FP32."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (4, 16), np.uint8), np.array([[167], [100], [100], [100]], np.uint8)
    codes[0], codes[0, 0] = 0, 0x05
    tensors = {"a.down_proj.weight_packed": ("U8", codes), "a.down_proj.weight_scale": ("U8", scales)}
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": tensors}, {})
    read = fp4cast.convert(tmp_path / "src", tmp_path / "a", layout=layout, inexact="nearest")
    unread = fp4cast.convert(tmp_path / "src", tmp_path / "b", layout=layout, inexact="nearest", verify=False)
    assert read.inexact[0].mse == pytest.approx(unread.inexact[0].mse, rel=1e-12)
    assert read.inexact[0].max_abs_error == pytest.approx(unread.inexact[0].max_abs_error, rel=1e-12)


def mixed_groups(tmp_path, **activations):
    """MXFP4 MLP, FP8 attention, INT4 head, as llm-compressor writes mixed recipes."""
    codes, scales = mini.mxfp4(np.random.default_rng(0), (8, 64))
    tensors = {
        "l.mlp.down_proj.weight_packed": ("U8", codes.reshape(8, -1)),
        "l.mlp.down_proj.weight_scale": ("U8", scales),
        "l.self_attn.o_proj.weight": ("F8_E4M3", np.zeros((8, 64), np.uint8)),
        "l.self_attn.o_proj.weight_scale": ("F32", np.ones((1,), np.float32)),
        "l.head.weight_packed": ("I32", np.zeros((8, 8), np.int32)),
        "l.norm.weight": ("BF16", np.ones(8, np.uint16)),
    }
    fp4 = {"num_bits": 4, "type": "float", "group_size": 32}
    int4 = {"num_bits": 4, "type": "int", "group_size": 32}
    groups = {
        "group_0": {"targets": ["re:.*mlp.*"], "weights": fp4, "format": "mxfp4-pack-quantized"},
        "group_1": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8}, "format": "float-quantized"},
        "group_2": {"targets": ["re:.*head.*"], "weights": int4, "format": "pack-quantized"},
    }
    groups["group_1"] |= activations
    config = {"quantization_config": {"format": "mixed-precision", "config_groups": groups, "ignore": []}}
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": tensors}, config)
    return tmp_path / "src", groups


@pytest.mark.parametrize("activations", [{}, {"input_activations": {"num_bits": 8, "type": "float"}}])
def test_other_quantized_groups_stay_as_they_are(tmp_path, activations):
    source, groups = mixed_groups(tmp_path, **activations)
    with pytest.raises(UsageError, match=r"quantized in another way than MXFP4"):
        fp4cast.convert(source, tmp_path / "dst")
    assert fp4cast.convert(source, tmp_path / "dst", layout="compressed-tensors").exact
    written = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert written["config_groups"]["group_1"] == groups["group_1"]
    assert written["config_groups"]["group_2"] == groups["group_2"]
    assert written["config_groups"]["group_0"]["format"] == "nvfp4-pack-quantized"
    assert written["ignore"] == []


@pytest.mark.parametrize(("kind", "layout"), [("kimi-k3", "compressed-tensors"), ("deepseek-v4.1", "modelopt")])
def test_a_manifest_in_two_places_ends_in_one(miniatures, tmp_path, kind, layout):
    source = shutil.copytree(miniatures[kind], tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    section = config.get("quantization_config") or config["text_config"]["quantization_config"]
    config["quantization_config"] = config["text_config"]["quantization_config"] = section
    (source / "config.json").write_text(json.dumps(config))
    assert fp4cast.convert(source, tmp_path / "dst", layout=layout, **options(kind)).exact


@pytest.mark.parametrize("weights", ["x", [1], 3])
def test_a_group_of_the_wrong_type_is_left_alone(miniatures, tmp_path, weights):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["odd"] = {"weights": weights}
    (source / "config.json").write_text(json.dumps(config))
    assert fp4cast.convert(source, tmp_path / "dst", layout="compressed-tensors").exact


@pytest.mark.parametrize("text", ['{"a":' * 600 + "1" + "}" * 600, '{"a": "\\ud800"}'])
def test_odd_configs_convert_or_are_refused(miniatures, tmp_path, text):
    source = shutil.copytree(miniatures["dense"], tmp_path / "src")
    (source / "config.json").write_text(text)
    try:
        assert fp4cast.convert(source, tmp_path / "dst").exact
    except CheckpointError as error:
        assert "nested too deeply" in str(error)


def test_the_public_function_has_two_ways_with_inexact_domains(miniatures, tmp_path):
    with pytest.raises(UsageError, match="'fail' or 'nearest'"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", inexact="report")


def test_jobs_must_be_a_number_of_threads(miniatures, tmp_path):
    with pytest.raises(UsageError, match="at least 1"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", jobs=0)


def test_without_the_compiled_transpose_the_bytes_are_the_same(tmp_path, miniatures, converted, monkeypatch):
    monkeypatch.setattr("fp4cast.checkpoints.transpose._KERNEL", None)
    assert fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst").verified
    assert tree(tmp_path / "dst") == tree(converted["gpt-oss"])


@pytest.mark.parametrize("kind", ["gpt-oss", "moe", "deepseek-v4"])
def test_byte_255_is_an_error_with_tensor_and_block(miniatures, tmp_path, kind):
    source = shutil.copytree(miniatures[kind], tmp_path / "src")
    pair = next(iter(read_source(open_checkpoint(source)).pairs.values()))
    edit(source, pair.scales.name, lambda data: data.__setitem__(11, 255))
    with pytest.raises(ScaleError, match=f"{pair.module} .*: block 11 has scale byte 255"):
        fp4cast.convert(source, tmp_path / "dst", **options(kind))
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_options_that_a_family_does_not_have(miniatures, tmp_path):
    with pytest.raises(UsageError, match="W4A4 only"):
        fp4cast.convert(miniatures["deepseek-v4"], tmp_path / "dst")
    with pytest.raises(UsageError, match="no engine reads gpt-oss"):
        fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst", layout="compressed-tensors")
    for wrong in ({"layout": "gguf"}, {"activations": "w8a8"}, {"inexact": "round"}):
        with pytest.raises(UsageError):
            fp4cast.convert(miniatures["moe"], tmp_path / "dst", **wrong)
    assert not list(tmp_path.iterdir())


def test_nothing_to_cast_is_an_error(tmp_path):
    tensors = {
        "mtp.0.ffn.experts.0.w1.weight": ("I8", np.zeros((4, 16), np.uint8)),
        "mtp.0.ffn.experts.0.w1.scale": ("F8_E8M0", np.full((4, 1), 120, np.uint8)),
    }
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": tensors}, {})
    with pytest.raises(UnsupportedError, match="1 MXFP4 tensors, but none"):
        fp4cast.convert(tmp_path / "src", tmp_path / "dst", activations="w4a4", input_scales=1.0)


def test_a_name_that_is_taken_is_refused(tmp_path):
    codes, scales = mini.mxfp4(np.random.default_rng(0), (8, 64))
    tensors = {
        "a.weight_packed": ("U8", codes.reshape(8, -1)),
        "a.weight_scale": ("U8", scales),
        "a.weight": ("BF16", np.zeros((8, 64), np.uint16)),
    }
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": tensors}, {})
    with pytest.raises(UnsupportedError, match=r"model-1\.safetensors: the cast would write 'a\.weight' beside"):
        fp4cast.convert(tmp_path / "src", tmp_path / "dst")


# --- the destination --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_a_destination_that_mixes_with_the_source_is_refused(miniatures, tmp_path, where):
    source = shutil.copytree(miniatures["dense"], tmp_path / "a" / "src")
    before = tree(tmp_path)
    with pytest.raises(DestinationError, match="must lie apart"):
        fp4cast.convert(source, source / where, overwrite=True)
    assert tree(tmp_path) == before


def test_an_existing_destination_is_kept_unless_told_otherwise(miniatures, converted, tmp_path):
    destination = older(converted, tmp_path / "dst")
    with pytest.raises(DestinationError, match="--overwrite"):
        fp4cast.convert(miniatures["dense"], destination, layout="compressed-tensors")
    assert (destination / "LICENSE").read_text() == "older"
    fp4cast.convert(miniatures["dense"], destination, overwrite=True)
    assert tree(destination) == tree(converted["dense"])
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_failed_overwrite_keeps_the_old_destination(miniatures, converted, tmp_path, monkeypatch):
    destination = older(converted, tmp_path / "dst")
    monkeypatch.setattr(converting, "execute", lambda *_, **__: (_ for _ in ()).throw(DestinationError("disk full")))
    with pytest.raises(DestinationError, match="disk full"):
        fp4cast.convert(miniatures["dense"], destination, overwrite=True)
    assert (destination / "LICENSE").read_text() == "older"


def test_a_killed_overwrite_gives_the_old_destination_back(miniatures, converted, tmp_path):
    """A run that died between two renames has left the older DST in the working directory."""
    (tmp_path / ".dst.fp4cast").mkdir()
    (tmp_path / ".dst.fp4cast" / "lock").touch()
    older(converted, tmp_path / ".dst.fp4cast" / "old")
    with pytest.raises(DestinationError, match="--overwrite"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert (tmp_path / "dst" / "LICENSE").read_text() == "older"


def test_a_rename_that_fails_gives_the_old_destination_back(miniatures, converted, tmp_path, monkeypatch):
    """Where two directories cannot be exchanged in one step."""
    destination, rename = older(converted, tmp_path / "dst"), Path.rename

    def fail(self, target):
        if self.name == "out":
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr("fp4cast.conversion.staging.exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(DestinationError, match="Permission denied"):
        fp4cast.convert(miniatures["dense"], destination, overwrite=True)
    assert (destination / "LICENSE").read_text() == "older"
    monkeypatch.setattr(Path, "rename", rename)
    assert fp4cast.convert(miniatures["dense"], destination, overwrite=True, resume=True).exact
    assert tree(destination) == tree(converted["dense"])


def test_what_appears_at_the_destination_meanwhile_is_kept(miniatures, tmp_path, monkeypatch):
    execute = converting.execute

    def meddle(*args, **kwargs):
        (tmp_path / "dst").mkdir()
        (tmp_path / "dst" / "mine").write_text("precious")
        return execute(*args, **kwargs)

    monkeypatch.setattr(converting, "execute", meddle)
    with pytest.raises(DestinationError):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert (tmp_path / "dst" / "mine").read_text() == "precious"


def test_a_link_as_destination_is_followed(miniatures, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert fp4cast.convert(miniatures["dense"], tmp_path / "link").exact
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()


def test_links_in_a_circle_are_a_clear_error(miniatures, tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(DestinationError):
        fp4cast.convert(miniatures["dense"], tmp_path / "a")


def test_an_empty_destination_may_be_filled(miniatures, tmp_path):
    (tmp_path / "dst").mkdir()
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst").exact


def test_a_destination_that_is_a_file_is_refused(miniatures, tmp_path):
    (tmp_path / "dst").write_text("x")
    with pytest.raises(DestinationError, match="not a directory"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst", overwrite=True)


def test_a_second_writer_is_refused(miniatures, tmp_path):
    state = tmp_path / ".dst.fp4cast"
    state.mkdir(parents=True)
    with (state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DestinationError, match="another fp4cast is writing it"):
            fp4cast.convert(miniatures["dense"], tmp_path / "dst")


def test_notes_that_a_run_killed_at_its_end_has_left_are_no_obstacle(miniatures, converted, tmp_path):
    (tmp_path / ".dst.fp4cast").mkdir()
    (tmp_path / ".dst.fp4cast" / "model-00002-of-00002.safetensors.done").write_bytes(b"{}")
    fp4cast.convert(miniatures["dense"], tmp_path / "dst", resume=True)
    assert tree(tmp_path / "dst") == tree(converted["dense"])
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_file_system_without_locks_is_no_obstacle(miniatures, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst").exact


def test_a_mount_point_is_refused_before_anything_is_written(miniatures, tmp_path, monkeypatch):
    (tmp_path / "dst").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "dst")
    with pytest.raises(DestinationError, match="mount point"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_full_disk_is_seen_before_anything_is_written(miniatures, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DestinationError, match=r"are needed there, 0\.00 GB are free"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_disk_that_fills_up_is_a_clear_error(miniatures, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(executing, "write_all", full)
    with pytest.raises(DestinationError, match=r"model-0000.*: cannot be written: No space left"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("after", [0.0, 0.3, 0.6, 0.95])
def test_a_killed_run_leaves_nothing_loadable_and_resumes_to_the_same_bytes(miniatures, converted, tmp_path, after):
    interrupted(miniatures["gpt-oss"], tmp_path / "dst", after)
    assert not (tmp_path / "dst").exists()
    assert not list(tmp_path.rglob("config.json"))
    fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst", resume=True)
    assert tree(tmp_path / "dst") == tree(converted["gpt-oss"])
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_resume_does_not_write_finished_shards_again(miniatures, tmp_path, monkeypatch):
    interrupted(miniatures["gpt-oss"], tmp_path / "dst", 0.7)
    written = []
    write = executing.write_shard
    monkeypatch.setattr(executing, "write_shard", lambda s, *rest: (written.append(s.file), write(s, *rest))[1])
    fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst", resume=True)
    assert written == ["model-00001-of-00002.safetensors"]


def test_resume_keeps_the_figures_of_finished_shards(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    whole = fp4cast.convert(source, tmp_path / "whole", inexact="nearest", verify=False)
    interrupted(source, tmp_path / "dst", 0.7, inexact="nearest")
    report = fp4cast.convert(source, tmp_path / "dst", inexact="nearest", resume=True, verify=False)
    assert report.facts() == whole.facts()


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"a": 1}'])
def test_a_damaged_note_has_its_shard_written_again(miniatures, converted, tmp_path, damage):
    interrupted(miniatures["gpt-oss"], tmp_path / "dst", 0.7)
    (tmp_path / ".dst.fp4cast" / "model-00000-of-00002.safetensors.done").write_text(damage)
    fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst", resume=True)
    assert tree(tmp_path / "dst") == tree(converted["gpt-oss"])


def test_a_damaged_shard_is_written_again(miniatures, converted, tmp_path):
    interrupted(miniatures["gpt-oss"], tmp_path / "dst", 0.7)
    shard = tmp_path / ".dst.fp4cast" / "out" / "model-00000-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))  # a power cut: the file is whole, its tail is not
    fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst", resume=True)
    assert tree(tmp_path / "dst") == tree(converted["gpt-oss"])


@pytest.mark.parametrize("name", ["tok.json", "lock", "out"])
def test_resume_keeps_nothing_that_the_source_has_lost(miniatures, tmp_path, monkeypatch, name):
    source = shutil.copytree(miniatures["dense"], tmp_path / "src")
    (source / name).write_text("{}")

    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fp4cast.verification.receipt.Receipt.to_bytes", broken)
    with pytest.raises(DestinationError, match="Input/output error"):
        fp4cast.convert(source, tmp_path / "dst")
    monkeypatch.undo()
    (source / name).rename(source / "tok2.json")
    fp4cast.convert(source, tmp_path / "dst", resume=True)
    assert not (tmp_path / "dst" / name).exists()
    assert (tmp_path / "dst" / "tok2.json").exists()


def test_resume_of_another_conversion_is_refused(miniatures, tmp_path):
    interrupted(miniatures["moe"], tmp_path / "dst", 0.6)
    with pytest.raises(DestinationError, match="other options"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", resume=True, layout="compressed-tensors")
    assert fp4cast.convert(miniatures["moe"], tmp_path / "dst", restart=True, layout="compressed-tensors").exact


def test_resume_with_other_input_scales_is_refused(miniatures, tmp_path):
    interrupted(miniatures["moe"], tmp_path / "dst", 0.6, activations="w4a4", input_scales=1.0)
    with pytest.raises(DestinationError, match="other options"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", resume=True, activations="w4a4", input_scales=2.0)


def test_an_error_says_where_the_finished_part_lies(miniatures, tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "check_unchanged", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DestinationError, match="No space left") as error:
        fp4cast.convert(miniatures["dense"], tmp_path / "dst")
    assert f"2 finished shards (0.00 GB) in {tmp_path}/.dst.fp4cast: the same command" in error.value.__notes__[0]
    assert error.value.__notes__[0].endswith(f"rm -r {tmp_path}/.dst.fp4cast")


def test_a_source_that_changes_underneath_is_an_error(miniatures, tmp_path, monkeypatch):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    shard = source / "model-00001-of-00002.safetensors"
    execute = converting.execute

    def meddle(*args, **kwargs):
        result = execute(*args, **kwargs)
        os.utime(shard, ns=(1, 1))
        return result

    monkeypatch.setattr(converting, "execute", meddle)
    with pytest.raises(CheckpointError, match="changed while it was converted"):
        fp4cast.convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_shard_truncated_while_it_is_read_is_an_error(miniatures, tmp_path, monkeypatch):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    shard = source / "model-00002-of-00002.safetensors"
    execute = converting.execute

    def meddle(*args, **kwargs):
        os.truncate(shard, shard.stat().st_size // 2)
        return execute(*args, **kwargs)

    monkeypatch.setattr(converting, "execute", meddle)
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*ended at byte"):
        fp4cast.convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_what_does_not_verify_is_not_published(miniatures, tmp_path, monkeypatch):
    write = executing.write_shard

    def damage(shard, path, *more):
        result = write(shard, path, *more)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return result

    monkeypatch.setattr(executing, "write_shard", damage)
    with pytest.raises(VerificationError, match="nothing was published"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    assert not (tmp_path / ".dst.fp4cast" / "out" / "config.json").exists()


def test_the_tensor_scale_is_the_closed_form(plain_miniatures, tmp_path):
    fp4cast.convert(plain_miniatures["gpt-oss"], tmp_path / "dst")
    for module, pair in read_source(open_checkpoint(plain_miniatures["gpt-oss"])).pairs.items():
        k_max = int(raw(plain_miniatures["gpt-oss"], pair.scales.name).max()) - 127
        assert scalar(tmp_path / "dst", f"{module}_weight_scale_2") == 2.0 ** (k_max - 8)


def test_compressed_tensors_stores_the_reciprocal(miniatures, tmp_path):
    fp4cast.convert(miniatures["dense"], tmp_path / "a")
    fp4cast.convert(miniatures["dense"], tmp_path / "b", layout="compressed-tensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert scalar(tmp_path / "b", f"{name}_global_scale") == 1 / scalar(tmp_path / "a", f"{name}_scale_2")


def test_input_scales_of_a_file_are_amax_over_2688(miniatures, tmp_path):
    modules = read_source(open_checkpoint(miniatures["moe"])).pairs
    amax = {module: 2688.0 * (i + 1) for i, module in enumerate(modules)}
    (tmp_path / "amax.json").write_text(json.dumps(amax))
    fp4cast.convert(miniatures["moe"], tmp_path / "dst", activations="w4a4", input_scales=tmp_path / "amax.json")
    expert = "model.layers.1.mlp.experts.2"
    gate, up, down = (f"{expert}.{leaf}_proj" for leaf in ("gate", "up", "down"))
    assert scalar(tmp_path / "dst", f"{down}.input_scale") == amax[down] / 2688
    shared = {scalar(tmp_path / "dst", f"{module}.input_scale") for module in (gate, up)}
    assert shared == {max(amax[gate], amax[up]) / 2688}


@pytest.mark.parametrize("kind", mini.KINDS)
def test_a_conversion_of_a_conversion_is_refused(converted, tmp_path, kind):
    expected = "already NVFP4" if kind not in DEEPSEEK else "but none that"
    with pytest.raises(UnsupportedError, match=expected):
        fp4cast.convert(converted[kind], tmp_path / "again", **options(kind))
