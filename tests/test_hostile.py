"""Input that an attack on the program found: each ends soon, in little memory, in an error that says what is wrong."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import INDEX, open_checkpoint
from fp4cast.checkpoints.header import lay_out
from fp4cast.checkpoints.quantization_config import drop_quantization_configs, set_quantization_config
from fp4cast.errors import (
    CheckpointError,
    DestinationError,
    HeaderError,
    IndexFileError,
    InputScaleError,
    UnsupportedError,
    UsageError,
)
from fp4cast.verification.files import verify_files
from helpers import interrupted, tree


@pytest.fixture
def source(miniatures, tmp_path):
    return shutil.copytree(miniatures["dense"], tmp_path / "src")


def edit_json(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


# --- files that lie about their size, their names or their depth ------------------------------------------------------


def test_a_small_json_needs_little_address_space(source):
    """As under a cluster's memory limit: 1 GiB used to be allocated for each JSON file."""
    code = (
        "import resource, sys; from pathlib import Path; resource.setrlimit(resource.RLIMIT_AS, (800 << 20,) * 2); "
        "from fp4cast.checkpoints.json_files import read_json; print(read_json(Path(sys.argv[1]))['model_type'])"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, source / "config.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "llama", done.stderr


def test_a_sparse_json_of_a_gigabyte_is_refused_unread(source):
    with (source / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"config\.json: has 1073741824 bytes; at most"):
        fp4cast.inspect(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "\udcff.safetensors", "ü" * 120 + ".safetensors"])
def test_file_names_that_no_file_system_takes_are_refused(source, name):
    edit_json(source / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(IndexFileError, match=r"lm_head\.weight.*expected at most 230 bytes"):
        fp4cast.inspect(source)


def test_a_tensor_name_of_a_megabyte_is_refused_in_a_short_message(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text("{}")
    placed = lay_out([("a." * 500_000 + "weight", "U8", (1,))], {})
    (tmp_path / "src" / "model.safetensors").write_bytes(placed.header + b"\0")
    with pytest.raises(HeaderError, match="at most 4096 characters, got 1000006") as caught:
        fp4cast.inspect(tmp_path / "src")
    assert len(str(caught.value)) < 1000


def test_folders_nested_beyond_reason_are_an_error(source, tmp_path):
    here = os.open(source, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    try:
        with pytest.raises(CheckpointError, match=r"nested too deeply|File name too long"):
            fp4cast.convert(source, tmp_path / "dst")
        assert not (tmp_path / "dst").exists()
    finally:
        subprocess.run([shutil.which("rm"), "-rf", source / "d"], check=True)


def test_a_source_that_links_to_itself_is_an_error(tmp_path):
    (tmp_path / "src").symlink_to(tmp_path / "src")
    with pytest.raises(CheckpointError):
        fp4cast.inspect(tmp_path / "src")
    with pytest.raises((CheckpointError, DestinationError)):
        fp4cast.convert(tmp_path / "src", tmp_path / "dst")


def test_an_unreadable_directory_is_an_error(source, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.is_dir", denied)
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint(source)


def test_a_tensor_called_metadata_is_refused_before_it_is_written(tmp_path):
    codes, scales = mini.mxfp4(np.random.default_rng(0), (2, 8, 64))
    tensors = {"__metadata___blocks": ("U8", codes), "__metadata___scales": ("U8", scales)}
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": tensors}, {})
    with pytest.raises(UnsupportedError, match=r"model-1\.safetensors: the cast would write .* no header can hold"):
        fp4cast.convert(tmp_path / "src", tmp_path / "dst", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("limit", [64, 100])
def test_more_shards_than_a_process_may_open(tmp_path, limit):
    """The system lets a process open 256 files on macOS; codes and scales lie in different shards here."""
    codes, scales = mini.mxfp4(np.random.default_rng(0), (200, 1, 64))
    pairs = {"packed": ("U8", codes.reshape(200, 1, 32)), "scale": ("U8", scales)}
    files = {f"model-{i:05}-of-00200.safetensors": {} for i in range(200)}
    for i, tensors in enumerate(files.values()):
        for shift, (part, (dtype, array)) in enumerate(pairs.items()):
            j = (i + 77 * shift) % 200
            tensors[f"layers.{j}.up_proj.weight_{part}"] = (dtype, array[j])
    mini.write_checkpoint(tmp_path / "src", files, {})
    source, destination = str(tmp_path / "src"), str(tmp_path / "dst")
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit},) * 2); "
        "from fp4cast.cli import main; main()"
    )
    for words in (
        ["inspect", source],
        ["convert", source, destination, "--jobs", "8"],
        ["verify", source, destination, "--jobs", "8"],
    ):
        command = [sys.executable, "-c", script, *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["exact"] is True


# --- configs ----------------------------------------------------------------------------------------------------------


def test_very_many_quantization_configs_take_no_time():
    config = {f"a{i}": {"quantization_config": {"quant_method": "y"}} for i in range(100_000)}
    begin = time.monotonic()
    set_quantization_config(config, {"quant_method": "x"})
    assert time.monotonic() - begin < 5
    assert config.pop("a0") == {"quantization_config": {"quant_method": "x"}}
    assert set(map(len, config.values())) == {0}


@pytest.mark.parametrize(
    ("config", "rest"),
    [
        ({"quantization_config": {"quantization_config": {"a": 1}}, "b": 2}, {"b": 2}),
        ({"quantization_config": {}, "compression_config": {}}, {}),
        ({"text_config": {"compression_config": {}, "c": 3}}, {"text_config": {"c": 3}}),
        (
            {"quantization_config": None, "text_config": {"quantization_config": 3}},
            {"text_config": {"quantization_config": 3}},
        ),
    ],
)
def test_all_quantization_configs_are_dropped(config, rest):
    drop_quantization_configs(config)
    assert config == rest


def test_very_many_exceptions_take_no_time(tmp_path):
    """Where a list of exceptions would take too long to compare, the layers are listed instead."""
    codes, scales = mini.mxfp4(np.random.default_rng(0), (1, 32))
    pair = {"packed": ("U8", codes.reshape(1, 16)), "scale": ("U8", scales)}
    cast = {f"m{i}.up_proj.weight_{part}": array for i in range(1500) for part, array in pair.items()}
    kept = {f"k{i}.weight": ("BF16", np.zeros((1, 1), np.uint16)) for i in range(1500)}
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": cast | kept}, {})
    begin = time.monotonic()
    assert fp4cast.convert(tmp_path / "src", tmp_path / "dst").exact
    assert time.monotonic() - begin < 15
    section = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert section["quant_algo"] == "MIXED_PRECISION"
    assert len(section["quantized_layers"]) == 1500


@pytest.mark.parametrize("group", ["x", 5, None, []])
def test_a_group_that_is_no_object_is_an_error(source, tmp_path, group):
    edit_json(source / "config.json", lambda c: c["quantization_config"]["config_groups"].update(group_0=group))
    with pytest.raises(CheckpointError, match=r"config\.json: config_groups\.group_0 is .*, expected an object"):
        fp4cast.convert(source, tmp_path / "dst", layout="compressed-tensors")
    assert not (tmp_path / "dst").exists()


def test_a_pattern_with_flags_that_contradict_each_other_is_an_error(miniatures, tmp_path):
    fp4cast.convert(miniatures["dense"], tmp_path / "dst", layout="compressed-tensors")
    edit_json(tmp_path / "dst" / "config.json", lambda c: c["quantization_config"]["ignore"].append("re:(?a)(?u)"))
    with pytest.raises(CheckpointError, match=r"config\.json: .*\(\?a\)\(\?u\).*pattern"):
        fp4cast.verify(miniatures["dense"], tmp_path / "dst")


# --- arguments of the library -----------------------------------------------------------------------------------------


def test_numbers_beyond_all_bounds_and_paths_with_nul(miniatures, tmp_path):
    with pytest.raises(InputScaleError, match="the constant: expected a number from"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", activations="w4a4", input_scales=10**400)
    with pytest.raises(CheckpointError, match="cannot be read"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", activations="w4a4", input_scales="x\0.safetensors")
    with pytest.raises(UsageError, match="whole number of at least 1, got '2'"):
        fp4cast.verify(miniatures["moe"], miniatures["moe"], jobs="2")


# --- destinations that lie --------------------------------------------------------------------------------------------


@pytest.fixture
def destination(converted, tmp_path):
    return shutil.copytree(converted["dense"], tmp_path / "dst")


def test_a_receipt_cannot_make_verify_read_other_files(miniatures, destination):
    with (destination / "big.bin").open("wb") as file:
        file.truncate(20 << 30)
    (destination.parent / "secret").write_text("x")
    names = ["big.bin", "x" * 300, "../secret", "/etc/hostname", "a\0b"]
    noted = {"bytes": 1, "xxh3": "0" * 32}
    edit_json(destination / "fp4cast.json", lambda r: r["files"].update(dict.fromkeys(names, noted)))
    assert not fp4cast.verify(miniatures["dense"], destination).ok  # the receipt has changed; nothing else is read
    said = {each.name: each.detail for each in verify_files(destination).differences}
    assert said["big.bin"] == f"expected 1 bytes, got {20 << 30}"
    assert not {"../secret", "/etc/hostname", "a\0b"} & said.keys()  # a path that leads out is nobody's


def test_a_changed_companion_of_the_same_size_and_time_is_found_by_the_same_process(miniatures, destination):
    assert fp4cast.verify(miniatures["dense"], destination).ok
    path = destination / "LICENSE"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-2] + b"X\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [each.name for each in fp4cast.verify(miniatures["dense"], destination).differences] == ["LICENSE"]


def test_a_changed_header_metadata_is_found(miniatures, destination):
    """transformers refuses a file whose format is not one that it knows."""
    shard = sorted(destination.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes().replace(b'{"format":"pt"}', b'{"format":"qt"}', 1))
    (difference,) = fp4cast.verify(miniatures["dense"], destination).differences
    assert (difference.name, difference.kind) == (shard.name, "header")


# --- working directories that somebody else has made ------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "out", "old", "plan", "lock"])
def test_links_in_the_place_of_a_working_directory_are_not_followed(source, tmp_path, inner):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("years")
    state = tmp_path / ".dst.fp4cast"
    if inner:
        state.mkdir()
    (state / inner).symlink_to(tmp_path / "victim")
    before = tree(tmp_path / "victim")
    with pytest.raises(DestinationError, match="is a link, not a working directory"):
        fp4cast.convert(source, tmp_path / "dst")
    assert tree(tmp_path / "victim") == before


def test_a_folder_of_that_name_with_other_files_is_left_alone(source, tmp_path):
    (tmp_path / ".dst.fp4cast").mkdir()
    (tmp_path / ".dst.fp4cast" / "thesis.txt").write_text("years")
    with pytest.raises(DestinationError, match=r"did not write: thesis\.txt"):
        fp4cast.convert(source, tmp_path / "dst")
    assert (tmp_path / ".dst.fp4cast" / "thesis.txt").read_text() == "years"


def test_a_working_directory_of_another_user_is_refused(source, tmp_path, monkeypatch):
    (tmp_path / ".dst.fp4cast").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(DestinationError, match="belongs to another user"):
        fp4cast.convert(source, tmp_path / "dst")


@pytest.mark.parametrize("name", ["plan", "lock"])
def test_a_pipe_in_the_place_of_a_file_is_refused(source, tmp_path, name):
    (tmp_path / ".dst.fp4cast").mkdir()
    os.mkfifo(tmp_path / ".dst.fp4cast" / name)
    with pytest.raises(DestinationError, match="is in the way"):
        fp4cast.convert(source, tmp_path / "dst", resume=True)


@pytest.mark.parametrize(
    "tallies",
    [
        '{"nobody": {"rounded": 1}}',
        '{"model.layers.0.mlp.up_proj": {"shifted": "x"}}',
        '{"model.layers.0.mlp.up_proj": {"rounded": -1}}',
        "[" * 5000 + "]" * 5000,
    ],
)
def test_a_note_that_cannot_be_true_has_its_shard_written_again(miniatures, converted, tmp_path, tallies):
    interrupted(miniatures["dense"], tmp_path / "dst", 0.6)
    notes = list((tmp_path / ".dst.fp4cast").glob("*.done"))
    assert notes
    for note in notes:
        plan = json.loads(note.read_text())["plan"]
        note.write_text(f'{{"plan": "{plan}", "tallies": {tallies}}}')
    fp4cast.convert(miniatures["dense"], tmp_path / "dst", resume=True)
    assert tree(tmp_path / "dst") == tree(converted["dense"])


def test_a_mark_that_is_no_text_is_another_plan(miniatures, tmp_path):
    interrupted(miniatures["dense"], tmp_path / "dst", 0.6)
    (tmp_path / ".dst.fp4cast" / "plan").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DestinationError, match="other options"):
        fp4cast.convert(miniatures["dense"], tmp_path / "dst", resume=True)
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst", restart=True).exact
