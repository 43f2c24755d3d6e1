"""A KV cache in FP8 that `convert` asks for: what it writes, and that every change of it is found."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import fp4cast
from documents import changes, documents_of, in_this_process, judge, leaves
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import UsageError
from fp4cast.layouts import patterns
from fp4cast.verification.receipt import Receipt
from helpers import call, edit, plain, raw

SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
VARIANTS = [(kind, layout) for kind in ("moe", "dense", "kimi-k3") for layout in ("modelopt", "compressed-tensors")]
VARIANTS.append(("gpt-oss", "modelopt"))
SCALES = [f"model.layers.{layer}.self_attn.{letter}_scale" for layer in (0, 1) for letter in "kv"]


@pytest.fixture(scope="module")
def cached(miniatures, tmp_path_factory):
    """(kind, layout) with a KV cache in FP8."""
    root = tmp_path_factory.mktemp("cached")
    for kind, layout in VARIANTS:
        report = fp4cast.convert(
            miniatures[kind], root / f"{kind}-{layout}", layout=layout, kv_cache_qformat="fp8_cast"
        )
        assert report.exact and report.to_json()["kv_cache_qformat"] == "fp8_cast"
    return root


@pytest.mark.parametrize(("kind", "layout"), VARIANTS)
def test_what_is_written(miniatures, converted, cached, kind, layout):
    path = cached / f"{kind}-{layout}"
    report = fp4cast.verify(miniatures[kind], path)
    assert report.ok and report.exact and report.kv_cache_qformat == "fp8_cast"
    assert json.loads((path / "fp4cast.json").read_text())["kv_cache_qformat"] == "fp8_cast"
    config = documents_of(path)["config.json"]
    section = config.get("quantization_config") or config["text_config"]["quantization_config"]
    written = open_checkpoint(path).tensors.keys()
    if layout == "modelopt":  # as ModelOpt: no scales
        assert section["kv_cache_scheme"] == SCHEME
        assert documents_of(path)["hf_quant_config.json"]["quantization"]["kv_cache_quant_algo"] == "FP8"
        assert written == open_checkpoint(converted[kind]).tensors.keys()
    else:
        assert section["kv_cache_scheme"] == {**SCHEME, "strategy": "tensor", "symmetric": True}
        found = sorted(name for name in written if name.endswith((".k_scale", ".v_scale")))
        assert found == ([] if kind == "kimi-k3" else SCALES)  # whose cache is a latent one
        assert all(raw(path, name).view("<f4").tolist() == [1.0] for name in found)


@pytest.mark.parametrize(("kind", "layout"), VARIANTS)
def test_every_change_of_what_the_documents_say_of_it_is_found(miniatures, cached, kind, layout, monkeypatch):
    """Without a receipt; but that compressed-tensors asks for no such cache at all, which scales left over tell."""
    monkeypatch.setattr(patterns, "_match", in_this_process)
    documents = documents_of(cached / f"{kind}-{layout}")
    accepted = judge(miniatures[kind], layout, "w4a16")
    assert accepted(documents)
    tried, missed = 0, set()
    for file, document in documents.items():
        for path in (path for path in leaves(document) if any("kv_cache" in str(key) for key in path)):
            for what, changed in changes(document, path):
                tried += 1
                if accepted({**documents, file: changed}):
                    missed.add((path[-1], what))
    assert missed == ({("kv_cache_scheme", "removed")} if layout == "compressed-tensors" else set())
    assert tried > 20


def test_a_cache_that_is_not_asked_for_any_more_is_found(miniatures, cached, tmp_path):
    path = shutil.copytree(cached / "dense-compressed-tensors", tmp_path / "dst")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["kv_cache_scheme"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "fp4cast.json").unlink()
    report = fp4cast.verify(miniatures["dense"], path)
    assert report.kv_cache_qformat == "none"
    assert sorted(each.name for each in report.differences if each.kind == "unexpected") == SCALES


def test_the_receipt_knows_the_format(miniatures, cached, converted, tmp_path):
    """Documents that agree with each other, and a receipt that says something else."""
    for number, (path, said) in enumerate(((cached / "dense-modelopt", "none"), (converted["dense"], "fp8_cast"))):
        copy = shutil.copytree(path, tmp_path / f"{number}")
        receipt = Receipt.read(copy)
        facts = {**receipt.facts, "kv_cache_qformat": said}
        (copy / "fp4cast.json").write_bytes(replace(receipt, facts=facts).to_bytes())
        (wrong,) = fp4cast.verify(miniatures["dense"], copy).differences
        assert f"says kv_cache_qformat is {said}, measured" in wrong.detail


def test_scales_that_were_not_written_are_found(miniatures, cached, tmp_path):
    path = shutil.copytree(cached / "dense-compressed-tensors", tmp_path / "value")
    edit(path, SCALES[1], lambda scale: scale.view("<f4").fill(np.nan))
    differences = fp4cast.verify(miniatures["dense"], path).differences
    assert {each.name for each in differences} == {SCALES[1], "fp4cast.json"}
    path = shutil.copytree(cached / "dense-compressed-tensors", tmp_path / "lost")
    change(path, SCALES[2], lambda tensors: tensors.pop(SCALES[2]))
    differences = fp4cast.verify(miniatures["dense"], path).differences
    assert (SCALES[2], "missing") in {(each.name, each.kind) for each in differences}
    path = shutil.copytree(cached / "dense-modelopt", tmp_path / "added")
    torch = pytest.importorskip("torch")
    added = {f"model.layers.0.self_attn.{x}_proj.{x}_scale": torch.tensor(0.5) for x in "kv"}
    change(path, "model.layers.0.self_attn.k_proj.weight", lambda tensors: tensors.update(added))
    report = fp4cast.verify(miniatures["dense"], path)
    assert report.kv_cache_qformat == "fp8"
    assert "the scales of the KV cache are not those that were written" in {each.detail for each in report.differences}


def change(path, name, edit_tensors):
    """Change which tensors the shard of one has."""
    torch_files = pytest.importorskip("safetensors.torch")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    file = index["weight_map"][name]
    tensors = torch_files.load_file(path / file)
    before, _ = set(tensors), edit_tensors(tensors)
    torch_files.save_file(tensors, path / file, {"format": "pt"})
    for gone in before - tensors.keys():
        del index["weight_map"][gone]
    index["weight_map"] |= dict.fromkeys(tensors.keys() - before, file)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_what_is_refused(miniatures, tmp_path):
    source = miniatures["dense"]
    for name, sentence in (
        ("fp8", "only running the model can find: use fp4cast ptq, or fp8_cast"),
        ("nvfp4", "only FP8 without offsets is written"),
        ("int4", "unknown kv_cache_qformat 'int4'"),
    ):
        for spelling in ("--kv-cache-qformat", "--kv_cache_qformat"):
            result = call("convert", source, tmp_path / "dst", spelling, name)
            assert result.exit_code == 2 and sentence in plain(result.stderr).replace("\n", " ")
    with pytest.raises(UsageError, match="engines keep the KV cache of DeepSeek-V4 in a format of their own"):
        fp4cast.convert(
            miniatures["deepseek-v4"], tmp_path / "dst", activations="w4a4", input_scales=1.0,
            kv_cache_qformat="fp8_cast",
        )  # fmt: skip
    own = shutil.copytree(source, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {**SCHEME, "strategy": "tensor"}
    (own / "config.json").write_text(json.dumps(config))
    for layout in ("modelopt", "compressed-tensors"):
        with pytest.raises(UsageError, match="has a kv_cache_scheme of its own"):
            fp4cast.convert(own, tmp_path / "dst", layout=layout, kv_cache_qformat="fp8_cast")
    assert not (tmp_path / "dst").exists()
    report = fp4cast.convert(own, tmp_path / "dst", layout="compressed-tensors")
    assert report.kv_cache_qformat == "none", "that of the source stays as it is"


def test_the_command_says_it(miniatures, tmp_path):
    shown = call("convert", miniatures["gpt-oss"], tmp_path / "dst", "--kv-cache-qformat", "fp8_cast").stdout
    assert "KV cache     FP8 with scales of 1" in shown
    assert "default: none" in plain(call("convert", "--help").stdout).split("kv-cache-qformat")[1][:400]
