"""What people name in place of a checkpoint: each gets its own sentence, with the next step."""

import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.checkpoints.instead import model_id
from fp4cast.errors import CheckpointError, HeaderError, UnsupportedError
from fp4cast.families.recognise import read_source
from fp4cast.hub.resolve import resolve
from fp4cast.layouts.engine_view import read_claims


def files(path):
    """(path, what is said) of files of many kinds."""
    (path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    (path / "blob").write_bytes(b"GGUF\3\0\0\0")
    save_file({"a": np.zeros(4, np.float32)}, path / "model.safetensors")
    with zipfile.ZipFile(path / "model.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    (path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (path / "config.json").write_text("{}")
    (path / "other").write_bytes(b"")
    return {
        "model.gguf": "a GGUF file.*name the Hugging Face checkpoint that it was made from",
        "blob": "a GGUF file",
        "model.safetensors": f"one file of a checkpoint. Name its directory, with config.json.*: {path}$",
        "model.zip": "a zip archive. Unpack it",
        "lfs": "a Git LFS pointer. Fetch the files with `git lfs pull`",
        "config.json": f"one file of a checkpoint. Name its directory: {path}$",
        "other": "a file. Name the directory of a checkpoint, or a model id",
    }


def test_a_file_of_any_kind_is_told_apart(tmp_path):
    for name, words in files(tmp_path).items():
        with pytest.raises(UnsupportedError, match=rf"{name}: is not a directory but {words}"):
            open_checkpoint(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing is there\. Check the path"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="A model id names its owner, too: openai/gpt-oss-20b"):
        open_checkpoint(resolve("gpt-oss-20b"))
    for empty in ("", " "):
        with pytest.raises(CheckpointError, match="the checkpoint's name is empty"):
            resolve(empty)


def test_a_pointer_instead_of_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(HeaderError, match=r"model.safetensors: is a Git LFS pointer, not the weights.*git lfs pull"):
        open_checkpoint(tmp_path)


def test_a_model_in_another_dtype(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.q.weight": np.zeros((2, 2), np.float16)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match=r"no MXFP4 weights.*can be quantized: fp4cast ptq --help"):
        read_source(checkpoint)
    with pytest.raises(
        UnsupportedError, match=r"describes no NVFP4 checkpoint, and no quantization at all. `fp4cast verify SRC"
    ):
        read_claims(checkpoint.config, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("openai/gpt-oss-20b", ("openai/gpt-oss-20b", None)),
        ("openai/gpt-oss-20b@refs/pr/3", ("openai/gpt-oss-20b", "refs/pr/3")),
        ("https://huggingface.co/openai/gpt-oss-20b", ("openai/gpt-oss-20b", None)),
        ("https://huggingface.co/openai/gpt-oss-20b/tree/v1.0", ("openai/gpt-oss-20b", "v1.0")),
        ("hf.co/openai/gpt-oss-20b?library=vllm", ("openai/gpt-oss-20b", None)),
        ("gpt-oss-20b", None),
        ("a/b/c", None),
    ],
)
def test_model_ids_and_pages_of_the_hub(text, found):
    assert model_id(text) == found


@pytest.mark.parametrize("url", ["https://example.org/a/b", "s3://bucket/model"])
def test_other_urls_are_refused(url):
    with pytest.raises(CheckpointError, match="is a URL that fp4cast does not read"):
        resolve(url)
