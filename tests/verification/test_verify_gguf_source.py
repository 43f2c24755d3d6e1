"""The MXFP4 weights of safetensors against a GGUF file, as llama.cpp's converter writes one."""

import re
from collections import defaultdict

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.families.recognise import read_source
from fp4cast.formats import unpack
from gguf_files import change, tensors
from helpers import raw

ARCHITECTURES = {"gpt-oss": "gpt-oss", "moe": "qwen3moe", "deepseek-v4": "deepseek4", "kimi-k3": "kimi-k3"}
KINDS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def blocks(path, pair):
    """Blocks of type 39 of a pair, uint8 [..., N, K / 32 * 17]: byte j holds elements j and j + 16."""
    codes = unpack(raw(path, pair.codes.name).reshape(*pair.scales.shape, 16))
    packed = codes[..., :16] | codes[..., 16:] << 4
    scales = raw(path, pair.scales.name).reshape(*pair.scales.shape, 1) + (127 - pair.bias)
    return np.concatenate([scales.astype(np.uint8), packed], axis=-1).reshape(*pair.scales.shape[:-1], -1)


def write(path, architecture, banks):
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(8)
    writer.add_file_type(38)
    for name, data in banks.items():
        kind = {np.dtype(np.uint8): Type.MXFP4}.get(data.dtype)
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def banks_of(source):
    """What llama.cpp makes of a checkpoint's experts, by name."""
    found, experts = {}, defaultdict(dict)
    for module, pair in read_source(open_checkpoint(source)).pairs.items():
        data = blocks(source, pair)
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", module)
        if pair.bank:
            at = f"blk.{layer[1]}.ffn_{{}}_exps.weight"
            kinds = {"gate": data[:, 0::2], "up": data[:, 1::2]} if "gate_up" in module else {"down": data}
            found |= {at.format(kind): rows for kind, rows in kinds.items()}
        elif layer and (expert := re.search(r"\.experts\.(\d+)\.(\w+)$", module)):
            experts[f"blk.{layer[1]}.ffn_{KINDS[expert[2]]}_exps.weight"][int(expert[1])] = data
    return found | {name: np.stack([each[i] for i in sorted(each)]) for name, each in experts.items()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_value_of_the_experts(kind, miniatures, tmp_path):
    source = miniatures[kind]
    path = write(tmp_path / "a.gguf", ARCHITECTURES[kind], banks_of(source))
    report = fp4cast.verify(source, path)
    assert report.ok and report.exact, report.differences
    unmapped = kind == "deepseek-v4"  # MTP
    assert report.tensors["cast"] + (3 * 2 if unmapped else 0) >= len(read_source(open_checkpoint(source)).pairs)
    assert any("were not compared" in note for note in report.notes)
    for name, tensor in tensors(path).items():
        for at in (0, tensor.n_bytes // 2, tensor.n_bytes - 1):
            before = tensor.data.reshape(-1)[at]
            change(path, name, int(at), int(before) ^ 0x11)
            wrong = fp4cast.verify(source, path)
            zeros = tensor.data.reshape(-1)[at // 17 * 17 + 1 : at // 17 * 17 + 17]
            if at % 17 or (zeros & 0x77).any():  # the scale of a block of zeros counts for nothing
                assert [(each.name, each.kind) for each in wrong.differences] == [(name, "values")], (name, at)
            change(path, name, int(at), int(before))


def test_nvfp4_with_tensor_scales(plain_miniatures, tmp_path):
    source = plain_miniatures["moe"]
    path = write(tmp_path / "a.gguf", "qwen3moe", banks_of(source))
    fp4cast.convert(path, tmp_path / "b.gguf")
    report = fp4cast.verify(source, tmp_path / "b.gguf")
    assert report.exact and report.half_blocks["shifted"] == 0
    kinds = {str(tensor.tensor_type.name) for tensor in tensors(tmp_path / "b.gguf").values()}
    assert {"MXFP4", "NVFP4"} <= kinds  # down has rows of 96


def test_a_tensor_scale_that_nobody_applies(plain_miniatures, tmp_path):
    source = plain_miniatures["moe"]
    banks = banks_of(source)
    name = "blk.0.ffn_up_exps.weight"
    fp4cast.convert(write(tmp_path / "a.gguf", "qwen3moe", {name: banks[name]}), tmp_path / "b.gguf")
    scale = name.replace("weight", "scale")
    assert scale in tensors(tmp_path / "b.gguf")
    data = (tmp_path / "b.gguf").read_bytes().replace(b"qwen3moe", b"qwen2moe")  # of the same length
    (tmp_path / "c.gguf").write_bytes(data)
    kinds = {(each.name, each.kind) for each in fp4cast.verify(source, tmp_path / "c.gguf").differences}
    assert {(scale, "unexpected"), (name, "values"), ("blk.0.ffn_down_exps.weight", "missing")} <= kinds


def test_dense_layers_by_the_packages_own_map(miniatures, tmp_path):
    source = miniatures["dense"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    found = {
        names.get_name(f"{module}.weight", try_suffixes=(".weight",)): blocks(source, pair)
        for module, pair in read_source(open_checkpoint(source)).pairs.items()
    }
    path = write(tmp_path / "a.gguf", "llama", found)
    report = fp4cast.verify(source, path)
    assert report.ok and report.exact
    assert report.tensors["cast"] == len(found) - 4 and "rows are reordered" in report.notes[-1]  # q and k of 2 layers
    change(path, "blk.1.ffn_up.weight", 3, 0xFF)
    assert [each.name for each in fp4cast.verify(source, path).differences] == ["blk.1.ffn_up.weight"]


def test_shapes_and_types_that_do_not_fit(miniatures, tmp_path):
    source = miniatures["gpt-oss"]
    banks = banks_of(source)
    name = next(iter(banks))
    path = write(tmp_path / "a.gguf", "gpt-oss", banks | {name: banks[name][:, 1:]})
    assert {(each.name, each.kind) for each in fp4cast.verify(source, path).differences} == {(name, "shape")}
    path = write(tmp_path / "b.gguf", "gpt-oss", banks | {name: np.ones((2, 3), np.float32)})
    assert {(each.name, each.kind) for each in fp4cast.verify(source, path).differences} == {(name, "dtype")}


def test_a_file_of_another_model_proves_nothing(miniatures, tmp_path):
    path = write(tmp_path / "a.gguf", "nonsense", {"whatever.weight": np.ones((2, 32), np.float32)})
    report = fp4cast.verify(miniatures["dense"], path)
    assert not report.ok and not report.exact
    assert [each.detail.partition(": ")[2] for each in report.differences] == ["nothing was compared"]


def test_an_expert_too_many_is_found(miniatures, tmp_path):
    source = miniatures["moe"]
    banks = banks_of(source)
    name, bank = next(iter(banks.items()))
    path = write(tmp_path / "a.gguf", "qwen3moe", banks | {name: np.concatenate([bank, bank[:1]])})
    assert {(each.name, each.kind) for each in fp4cast.verify(source, path).differences} == {(name, "shape")}


def test_the_sign_of_a_zero_counts_and_no_scale_is_nan(plain_miniatures, tmp_path):
    source = plain_miniatures["moe"]
    fp4cast.convert(write(tmp_path / "a.gguf", "qwen3moe", banks_of(source)), tmp_path / "b.gguf")
    for file, size, codes in (("a.gguf", 17, slice(1, 17)), ("b.gguf", 36, slice(4, 36))):
        path = tmp_path / file
        name = next(n for n, t in tensors(path).items() if t.tensor_type.name == {17: "MXFP4", 36: "NVFP4"}[size])
        data = np.array(tensors(path)[name].data).reshape(-1, size)
        block, byte = np.argwhere(data[:, codes] & 15 == 0)[0]
        at = int(block) * size + codes.start + int(byte)
        change(path, name, at, int(data.reshape(-1)[at]) | 8)
        assert [(each.name, each.kind) for each in fp4cast.verify(source, path).differences] == [(name, "values")]
        change(path, name, at, int(data.reshape(-1)[at]))
    change(path, name, 0, 0x7F)
    assert [(each.name, each.kind) for each in fp4cast.verify(source, path).differences] == [(name, "values")]
