"""Directories are untrusted too."""

import json
import os
import shutil

import pytest

import fp4cast
from fp4cast.checkpoints.directory import INDEX, open_checkpoint
from fp4cast.errors import CheckpointError, IndexFileError, UnsupportedError


@pytest.fixture
def source(miniatures, tmp_path):
    return shutil.copytree(miniatures["dense"], tmp_path / "src")


def edit_index(source, change):
    index = json.loads((source / INDEX).read_text())
    change(index)
    (source / INDEX).write_text(json.dumps(index))


def test_every_tensor_is_found_once_in_the_order_of_the_bytes(miniatures):
    checkpoint = open_checkpoint(miniatures["gpt-oss"])
    assert len(checkpoint.tensors) == sum(len(shard.tensors) for shard in checkpoint.shards.values())
    for shard in checkpoint.shards.values():
        starts = [t.start for t in checkpoint.tensors.values() if t.path == shard.path]
        assert starts == sorted(starts)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd.safetensors", "a/b.safetensors", "..", ".", "", "x\0.safetensors", 7, None],
)
def test_an_index_entry_that_leaves_the_directory_is_refused(source, file):
    edit_index(source, lambda index: index["weight_map"].update({"lm_head.weight": file}))
    with pytest.raises(IndexFileError, match=r"lm_head\.weight.*same directory"):
        open_checkpoint(source)


def test_an_index_entry_of_another_format_is_refused(source):
    edit_index(source, lambda index: index["weight_map"].update({"lm_head.weight": "weights.bin"}))
    with pytest.raises(IndexFileError, match=r"expected a \.safetensors file"):
        open_checkpoint(source)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_a_useless_weight_map_is_refused(source, weight_map):
    edit_index(source, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(IndexFileError, match="weight_map"):
        open_checkpoint(source)


def test_a_missing_shard_is_named(source):
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(IndexFileError, match="1 of 2 shards are missing, the first is model-00002-of-00002"):
        open_checkpoint(source)


def test_an_index_that_lists_a_tensor_that_is_not_there_is_refused(source):
    edit_index(source, lambda i: i["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}))
    with pytest.raises(IndexFileError, match="'ghost' is not in model-00001-of-00002"):
        open_checkpoint(source)


def test_a_tensor_that_the_index_does_not_list_is_refused(source):
    edit_index(source, lambda i: i["weight_map"].pop("lm_head.weight"))
    with pytest.raises(IndexFileError, match=r"'lm_head.weight' is in this file, but .* says 'nowhere'"):
        open_checkpoint(source)


def test_truncated_shards_are_refused(source):
    path = source / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(source)


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(source, content):
    (source / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(source)


def test_a_config_that_is_not_there_is_an_error(source):
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        open_checkpoint(source)


def test_a_config_that_is_no_file_is_an_error_not_a_wait(source):
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(source)


def test_a_config_that_links_to_a_private_file_is_refused(source, tmp_path):
    (tmp_path / "secret.json").write_text('{"token": "x"}')
    (source / "config.json").unlink()
    (source / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        open_checkpoint(source)


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.gguf", "config.json"], "GGUF"),
        (["model.bin"], "metal/ format"),
        (["pytorch_model.bin", "config.json"], "holds pytorch_model.bin, a pickle.*reads safetensors alone"),
        (["config.json"], "holds config.json but no weights. Finish the download: hf download"),
        (["model-00001-of-00002.safetensors", "config.json"], "no model.safetensors.index.json; download the index"),
        (["README.md"], "expected a Hugging Face checkpoint"),
    ],
)
def test_other_formats_are_named(tmp_path, files, message):
    for file in files:
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(tmp_path)


def test_companions_leave_weights_and_other_formats_behind(miniatures):
    names = [str(name) for name in open_checkpoint(miniatures["gpt-oss"]).companions()]
    assert names == ["LICENSE", "encoding/tokens.py", "generation_config.json"]


def test_a_link_to_a_private_file_is_not_carried_along(source, tmp_path):
    (tmp_path / "secret").write_text("key")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        list(open_checkpoint(source).companions())


def test_links_into_the_hub_cache_are_followed(miniatures, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(miniatures["dense"], blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        if file.is_file():
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    checkpoint = open_checkpoint(snapshot)
    assert [str(name) for name in checkpoint.companions()] == ["LICENSE", "generation_config.json"]


NESTED = ["sub/config.json", "sub/a/hf_quant_config.json", "tokenizer/fp4cast.json", "tokenizer/x.jinja"]
LEFT = [
    ".cache/config.json",
    "sub/.hidden",
    "onnx/config.json",
    "sub/__pycache__/x.py",
    "sub/model.safetensors.index.json",
]


def test_only_the_model_s_own_config_stays_behind(source, tmp_path):
    """A tokenizer's or an assistant model's is a file like any other."""
    before = {str(name) for name in open_checkpoint(source).companions()}
    for name in (*NESTED, *LEFT):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"this is {name}")
    names = [str(name) for name in open_checkpoint(source).companions()]
    assert set(names) == before | set(NESTED)
    fp4cast.convert(source, tmp_path / "dst")
    for name in NESTED:
        assert (tmp_path / "dst" / name).read_text() == f"this is {name}"
    (tmp_path / "dst" / NESTED[0]).write_text("edited")
    assert [each.name for each in fp4cast.verify(source, tmp_path / "dst").differences] == [NESTED[0]]
    (tmp_path / "dst" / NESTED[0]).unlink()
    assert not fp4cast.verify(source, tmp_path / "dst", strict=True).ok


def test_a_folder_that_cannot_be_listed_is_an_error(source, tmp_path, monkeypatch):
    (source / "sub" / "locked").mkdir(parents=True)
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(CheckpointError, match=r"sub/locked: cannot be listed: Permission denied"):
        fp4cast.convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    (source / "sub" / "locked").rename(source / ".locked")
    assert fp4cast.convert(source, tmp_path / "dst").exact, "a hidden folder is not looked into"
