"""Mixtures of formats, half-downloaded folders and pointers are called what they are, with the next step."""

import json
import os
import shutil

import numpy as np
import pytest

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.errors import CheckpointError
from fp4cast.miniatures.quark import layer, quark

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
SHARD = "model-00002-of-00002.safetensors"
FILES = [SHARD, "config.json", "model.safetensors.index.json"]


@pytest.fixture
def source(miniatures, tmp_path):
    return shutil.copytree(miniatures["modelopt-mxfp4"], tmp_path / "src")


@pytest.mark.parametrize("file", FILES)
def test_a_pointer_of_git_lfs_is_called_that(source, file):
    (source / file).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{file}: is a Git LFS pointer.*git lfs pull.*hf download"):
        fp4cast.inspect(source)


def test_so_is_one_of_the_file_that_names_the_maker(source):
    (source / "config.json").write_text("{}")
    (source / "hf_quant_config.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: is a Git LFS pointer"):
        fp4cast.inspect(source)


@pytest.mark.parametrize("left", [0, 7, 5000, -100, "zeros", "missing", "incomplete"])
def test_a_half_downloaded_shard_is_named_with_what_to_do(source, left):
    path = source / SHARD
    size = path.stat().st_size
    if left == "zeros":  # what some tools allocate before they fill it
        path.write_bytes(bytes(size))
    elif left == "missing":
        path.unlink()
    elif left == "incomplete":
        path.rename(path.with_name(f"{SHARD}.incomplete"))
    else:
        os.truncate(path, left % size)
    with pytest.raises(CheckpointError, match=rf"{SHARD}.*([Ff]inish the|download it again)"):
        fp4cast.inspect(source)


def mixed(path, **beside):
    """A Quark checkpoint of one MXFP4 projection, and another in a second format."""
    codes, scales = mini.mxfp4(np.random.default_rng(0), (32, 64))
    tensors = {
        "model.layers.0.mlp.down_proj.weight": ("U8", codes.reshape(32, -1)),
        "model.layers.0.mlp.down_proj.weight_scale": ("U8", scales),
        **{f"model.layers.0.self_attn.o_proj.{leaf}": tensor for leaf, tensor in beside.items()},
    }
    section = quark(["lm_head"]) | {"layer_quant_config": {"*self_attn*": layer("fp8_e4m3")}}
    mini.write_checkpoint(path, {"model-1.safetensors": tensors}, {"quantization_config": section})
    return path


def array(dtype, *shape):
    return np.zeros(shape, dtype)


BESIDE = {
    "MXFP8": {"weight": ("F8_E4M3", array("u1", 32, 64)), "weight_scale": ("U8", array("u1", 32, 2))},
    "FP8 in blocks": {"weight": ("F8_E4M3", array("u1", 32, 64)), "weight_scale_inv": ("F32", array("f4", 1, 1))},
}


@pytest.mark.parametrize("other", BESIDE)
def test_a_projection_in_fp8_beside_mxfp4_is_named_before_anything_is_written(tmp_path, other):
    source = mixed(tmp_path / "src", **BESIDE[other])
    info = fp4cast.inspect(source)
    assert (info.family, info.cast) == ("quark", 1)
    said = r"self_attn\.o_proj\.weight \(F8_E4M3 .*\) is quantized in another way than MXFP4, which the modelopt layout"
    assert all(target["refused"] for target in info.to_json()["layouts"])
    with pytest.raises(fp4cast.errors.UsageError, match=said) as error:
        fp4cast.convert(source, tmp_path / "dst")
    assert {target["refused"] for target in info.to_json()["layouts"]} == {str(error.value)}
    assert not (tmp_path / "dst").exists()


def test_what_can_be_converted_is_not_refused(miniatures):
    for kind in ("quark", "deepseek-v4", "moe"):
        layouts = fp4cast.inspect(miniatures[kind]).to_json()["layouts"]
        assert [entry["refused"] for entry in layouts] == [None] * len(layouts)


def test_inspect_says_it_in_words(tmp_path):
    from helpers import call, plain

    text = plain(call("inspect", mixed(tmp_path / "src", **BESIDE["MXFP8"])).stdout)
    assert "is quantized in another way than MXFP4" in " ".join(text.split())
    assert "vllm serve" not in text
    assert json.loads(call("inspect", tmp_path / "src", "--json").stdout)["layouts"][0]["refused"]
