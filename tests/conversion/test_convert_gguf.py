"""GGUF files: MXFP4 blocks (type 39) become NVFP4 blocks (type 40), held against the `gguf` package."""

import itertools
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize

import fp4cast
from fp4cast.casting.nearest import encode
from fp4cast.casting.tight_rule import Scaling
from fp4cast.checkpoints.gguf_file import read_header
from fp4cast.conversion import gguf_blocks
from fp4cast.conversion.gguf_blocks import halves, super_blocks
from fp4cast.errors import (
    CheckpointError,
    DestinationError,
    Fp4CastError,
    HeaderError,
    InexactError,
    MissingExtraError,
    ScaleError,
    UnsupportedError,
    UsageError,
)
from fp4cast.formats import E2M1, E4M3, E8M0
from gguf_files import LENGTHS, change, make, records, tensors
from helpers import call

UP = "blk.0.ffn_up_exps.weight"
SCALE = "blk.0.ffn_up_exps.scale"


def values(tensor, scales=1.0):
    found = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    return found * np.reshape(scales, (-1, *[1] * (found.ndim - 1)))


def test_every_code_under_every_scale_means_what_the_package_says():
    codes = np.arange(16, dtype=np.uint8)
    for exponent in range(253):  # under 253 and 254 the package overflows FP32, and 255 is NaN
        block = np.concatenate([[exponent], codes | codes[::-1] << 4]).astype(np.uint8)[None]
        expected = E2M1.values[np.concatenate([codes, codes[::-1]])] * E8M0.values[exponent]
        assert np.array_equal(dequantize(block, Type.MXFP4)[0], expected)
    for scale in range(127):
        packed = codes[:8] | codes[8:] << 4
        block = np.concatenate([[scale] * 4, *[packed] * 4]).astype(np.uint8)[None]
        expected = np.tile(E2M1.values * E4M3.values[scale], 4)
        assert np.array_equal(dequantize(block, Type.NVFP4)[0], expected)
    block[0, :4] = 0x7F  # NaN elsewhere
    assert not dequantize(block, Type.NVFP4).any()


def test_blocks_keep_the_order_of_their_weights():
    found = records(np.random.default_rng(1), (64, 128), -9, 8).reshape(-1, 17)
    encoded = encode(halves(found), found[:, 0].copy(), Scaling(1.0, 0, -9, 8, 0, 0, True))
    written = super_blocks(encoded.codes, encoded.block_scales)
    assert written.shape == (len(found) // 2, 36)
    assert np.array_equal(dequantize(found.reshape(1, -1), Type.MXFP4), dequantize(written.reshape(1, -1), Type.NVFP4))


@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss"])
def test_where_the_exponents_fit_no_tensor_scale_is_written(tmp_path, architecture):
    source = make(tmp_path / "a.gguf", architecture=architecture)
    report = fp4cast.convert(source, tmp_path / "b.gguf")
    assert report.exact and report.verified and report.ok
    assert report.tensors == {"cast": 1, "exact": 1, "inexact": 0, "copied": 2}
    assert report.half_blocks == {"verbatim": 256, "shifted": 0, "rounded": 0}
    before, after = tensors(source), tensors(tmp_path / "b.gguf")
    assert list(before) == list(after)
    assert after[UP].tensor_type == Type.NVFP4
    assert np.array_equal(values(before[UP]), values(after[UP]))
    assert not list(tmp_path.glob(".*"))


def test_metadata_stays_byte_for_byte_but_for_the_type_of_the_file(tmp_path):
    fp4cast.convert(make(tmp_path / "a.gguf"), tmp_path / "b.gguf")
    before, after = read_header(tmp_path / "a.gguf"), read_header(tmp_path / "b.gguf")
    differing = [i for i, (a, b) in enumerate(zip(before.metadata, after.metadata, strict=True)) if a != b]
    assert differing == [before.values["general.file_type"].start]
    assert after.value("general.file_type") == gguf.LlamaFileType.MOSTLY_NVFP4
    assert GGUFReader(tmp_path / "b.gguf").fields["tokenizer.ggml.tokens"].contents() == ["a", "", "ü"]


def test_experts_get_tensor_scales_where_llama_cpp_applies_them(tmp_path):
    source = make(tmp_path / "a.gguf", low=-30, high=-14)
    report = fp4cast.convert(source, tmp_path / "b.gguf")
    assert report.exact and "1 tensors have tensor scales" in report.notes[0]
    before, after = tensors(source), tensors(tmp_path / "b.gguf")
    assert list(after) == ["token_embd.weight", UP, SCALE, "blk.0.ffn_up_exps.bias"]
    scales = after[SCALE].data
    assert (after[SCALE].tensor_type, scales.tolist()) == (Type.F32, [2.0**-22] * 4)
    assert np.array_equal(values(before[UP]), values(after[UP], scales))


def test_each_expert_has_its_own_scale(tmp_path):
    rng = np.random.default_rng(2)
    bank = np.stack([records(rng, (8, 64), low, low + 15) for low in (-40, -12, 3)])
    bank.reshape(-1, 17)[::16, 0] = np.array([-25, 3, 18]) + 127  # the largest of each
    source = make(tmp_path / "a.gguf", {"blk.1.ffn_down_exps.weight": bank})
    assert fp4cast.convert(source, tmp_path / "b.gguf").exact
    after = tensors(tmp_path / "b.gguf")
    scales = after["blk.1.ffn_down_exps.scale"].data
    assert scales.tolist() == [2.0**-33, 2.0**-5, 2.0**10]
    name = "blk.1.ffn_down_exps.weight"
    assert np.array_equal(values(tensors(source)[name]), values(after[name], scales))


def test_codes_are_shifted_where_that_is_exact(tmp_path):
    block = np.full((1, 17), 0x77, np.uint8)  # 6 everywhere
    low, high = block.copy(), block.copy()
    low[:, 1:], low[:, 0] = 0x66, 127 - 11  # 4 * 2^-11 = 1 * 2^-9
    high[:, 1:], high[:, 0] = 0x11, 127 + 11  # 0.5 * 2^11 = 4 * 2^8
    source = make(tmp_path / "a.gguf", {"output.weight": np.concatenate([low, high], axis=1)}, architecture="gpt-oss")
    report = fp4cast.convert(source, tmp_path / "b.gguf")
    assert report.exact and report.half_blocks == {"verbatim": 256, "shifted": 4, "rounded": 0}
    assert np.array_equal(
        values(tensors(source)["output.weight"]), values(tensors(tmp_path / "b.gguf")["output.weight"])
    )


@pytest.mark.parametrize(
    ("architecture", "name", "why"),
    [
        ("gpt-oss", UP, "applies none for 'gpt-oss'"),
        ("qwen3moe", "blk.0.attn_q.weight", "to some of qwen3moe's tensors"),
        ("qwen3moe", "blk.0.ffn_gate_up_exps.weight", "to some of qwen3moe's tensors"),
    ],
)
def test_what_is_not_exact_is_refused_with_its_block(tmp_path, architecture, name, why):
    data = records(np.random.default_rng(3), (8, 128), -9, 8)
    data[5, 17 * 2] = 127 - 10
    data[5, 17 * 2 + 1 :][:16] = 0x17  # 6 and 0.5 leave no room
    extra = {"blk.9.attn_q.weight" if name == UP else name: data}
    source = make(tmp_path / "a.gguf", extra, architecture=architecture)
    (refused,) = extra
    with pytest.raises(InexactError, match=rf"{why}[\s\S]*{refused}: block 22 needs S of 2\^-1 or less"):
        fp4cast.convert(source, tmp_path / "b.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    info = fp4cast.inspect(source)
    assert not info.exact and [domain.name for domain in info.domains if not domain.exact] == [refused]
    assert why in info.notes[-1]


def test_an_expert_beyond_any_tensor_scale_is_refused(tmp_path):
    with pytest.raises(InexactError, match=r"\(expert 0\): blocks \d+ and \d+ need S of 2\^-?\d+ or more"):
        fp4cast.convert(make(tmp_path / "a.gguf", low=-20, high=8), tmp_path / "b.gguf")


def test_a_scale_that_is_there_already_stays_and_is_not_multiplied(tmp_path):
    scale = np.array([1.5, 2, 3, 4], np.float32)
    source = make(tmp_path / "a.gguf", {SCALE: scale})
    assert fp4cast.convert(source, tmp_path / "b.gguf").exact
    assert np.array_equal(tensors(tmp_path / "b.gguf")[SCALE].data, scale)
    with pytest.raises(InexactError):
        fp4cast.convert(make(tmp_path / "c.gguf", {SCALE: scale}, low=-30, high=-20), tmp_path / "d.gguf")


def test_a_file_of_a_split_model_gets_no_new_tensors(tmp_path):
    source = make(tmp_path / "a-00001-of-00002.gguf", split__count=2)
    assert fp4cast.convert(source, tmp_path / "b-00001-of-00002.gguf").exact
    with pytest.raises(InexactError, match="all files of a split"):
        fp4cast.convert(make(tmp_path / "c.gguf", low=-30, high=-20, split__count=2), tmp_path / "d.gguf")


def test_rows_of_an_odd_number_of_blocks_stay_mxfp4(tmp_path):
    rows = records(np.random.default_rng(4), (4, 96), -60, 60)
    source = make(tmp_path / "a.gguf", {"output.weight": rows})
    report = fp4cast.convert(source, tmp_path / "b.gguf")
    after = tensors(tmp_path / "b.gguf")
    assert report.exact and "output.weight" in report.notes[0] and report.tensors["copied"] == 3
    assert after["output.weight"].tensor_type == Type.MXFP4
    assert read_header(tmp_path / "b.gguf").value("general.file_type") == gguf.LlamaFileType.MOSTLY_MXFP4_MOE


def test_a_scale_byte_of_255_is_an_error_that_names_the_block(tmp_path):
    source = make(tmp_path / "a.gguf")
    change(source, UP, 17 * 40, 255)
    with pytest.raises(ScaleError, match=rf"{UP}.*block 40 has scale byte 255"):
        fp4cast.convert(source, tmp_path / "b.gguf")


def test_nothing_to_cast_is_an_error(tmp_path):
    fp4cast.convert(make(tmp_path / "a.gguf"), tmp_path / "b.gguf")
    with pytest.raises(UnsupportedError, match="no MXFP4 tensor, so there is nothing to cast: 2 F32, 1 NVFP4"):
        fp4cast.convert(tmp_path / "b.gguf", tmp_path / "c.gguf")


def test_bytes_do_not_depend_on_threads_or_chunks(tmp_path, monkeypatch):
    source = make(tmp_path / "a.gguf", low=-30, high=-14)
    fp4cast.convert(source, tmp_path / "one.gguf", jobs=1)
    monkeypatch.setattr("fp4cast.conversion.gguf.CHUNK_BLOCKS", 6)
    monkeypatch.setattr(gguf_blocks, "CHUNK_BLOCKS", 7)
    monkeypatch.setattr("fp4cast.verification.gguf.BLOCKS", 10)
    fp4cast.convert(source, tmp_path / "many.gguf", jobs=3)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_a_tensor_is_never_held(tmp_path):
    rows = records(np.random.default_rng(5), (1 << 12, 1 << 14), -9, 8)  # 36 MB
    source = make(tmp_path / "a.gguf", {"blk.0.ffn_down.weight": rows})
    size = rows.nbytes
    del rows
    fp4cast.convert(make(tmp_path / "warm.gguf"), tmp_path / "up.gguf", jobs=1)
    tracemalloc.start()
    try:
        assert fp4cast.convert(source, tmp_path / "b.gguf", jobs=1, sync=False, verify=False).exact
        assert tracemalloc.get_traced_memory()[1] < size / 3
    finally:
        tracemalloc.stop()


def test_nothing_is_replaced_or_left_half(tmp_path):
    source = make(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_text("mine")
    with pytest.raises(DestinationError, match="exists"):
        fp4cast.convert(source, tmp_path / "b.gguf")
    with pytest.raises(UsageError, match="overwrite"):
        fp4cast.convert(source, tmp_path / "b.gguf", overwrite=True)

    def stop(phase, *_):
        if phase == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp4cast.convert(source, tmp_path / "c.gguf", progress=stop, jobs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]
    assert (tmp_path / "b.gguf").read_text() == "mine"


def test_what_comes_to_lie_there_meanwhile_stays(tmp_path):
    def meddle(phase, *_):
        if phase == "verify":
            (tmp_path / "b.gguf").write_text("mine")

    with pytest.raises(DestinationError, match="exists"):
        fp4cast.convert(make(tmp_path / "a.gguf"), tmp_path / "b.gguf", progress=meddle, jobs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]
    assert (tmp_path / "b.gguf").read_text() == "mine"


def test_without_hard_links_it_is_renamed(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", none)
    assert fp4cast.convert(make(tmp_path / "a.gguf"), tmp_path / "b.gguf").exact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


@pytest.mark.parametrize("key", ["split.count", "general.file_type"])
def test_a_key_of_another_type_than_expected_is_no_traceback(tmp_path, key):
    """A list where llama.cpp has a number."""
    source = tmp_path / "a.gguf"
    make(source, lists={key: [1, 2]})
    assert fp4cast.convert(source, tmp_path / "b.gguf").exact
    assert fp4cast.verify(source, tmp_path / "b.gguf").ok


def test_an_alignment_that_no_memory_holds_is_refused(tmp_path):
    source = make(tmp_path / "a.gguf", lists={})
    data = source.read_bytes()
    at = data.index(b"general.file_type")
    entry = b"general.alignment" + struct.pack("<II", 4, 1 << 30)
    source.write_bytes(data[:at] + entry + data[at + len(entry) :])
    with pytest.raises(HeaderError, match="expected a power of two up to 1048576"):
        fp4cast.inspect(source)


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fp4cast.conversion.gguf.copy_range", full)
    with pytest.raises(DestinationError, match=r"b\.gguf: No space left on device"):
        fp4cast.convert(make(tmp_path / "a.gguf"), tmp_path / "b.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_two_writers(tmp_path):
    source, seen = make(tmp_path / "a.gguf"), []

    def second(phase, *_):
        if phase == "write" and not seen:
            with pytest.raises(DestinationError, match="another fp4cast is writing it"):
                seen.append(1)
                fp4cast.convert(source, tmp_path / "b.gguf")

    assert fp4cast.convert(source, tmp_path / "b.gguf", progress=second, jobs=1).exact
    assert seen


@pytest.mark.parametrize(
    "wrong",
    [
        {"activations": "w4a4", "input_scales": 1.0},
        {"inexact": "nearest"},
        {"kv_cache_qformat": "fp8_cast"},
        {"layout": "compressed-tensors"},
        {"restart": True},
    ],
)
def test_options_that_gguf_has_no_place_for(tmp_path, wrong):
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}.*no option for GGUF"):
        fp4cast.convert(make(tmp_path / "a.gguf"), tmp_path / "b.gguf", **wrong)


def test_kinds_that_do_not_go_together(tmp_path, miniatures):
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        fp4cast.convert(make(tmp_path / "a.gguf"), tmp_path / "b")
    with pytest.raises(UnsupportedError, match=r"convert_hf_to_gguf\.py"):
        fp4cast.convert(miniatures["gpt-oss"], tmp_path / "b.gguf")


def test_without_the_extra(tmp_path, monkeypatch):
    source = make(tmp_path / "a.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"fp4cast\[gguf\]"):
        fp4cast.inspect(source)


def test_the_command_line(tmp_path):
    source = make(tmp_path / "a.gguf", low=-30, high=-14)
    shown = json.loads(call("convert", source, tmp_path / "b.gguf", "--dry-run", "--json").stdout)
    assert not (tmp_path / "b.gguf").exists()
    done = call("convert", source, tmp_path / "b.gguf", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["layout"] == "gguf"
    assert shown["files"] == {"b.gguf": (tmp_path / "b.gguf").stat().st_size}
    assert json.loads(call("verify", source, tmp_path / "b.gguf", "--json").stdout)["exact"]
    info = json.loads(call("inspect", source, "--json").stdout)
    assert info["bytes"]["destination"] == (tmp_path / "b.gguf").stat().st_size
    assert info["notes"][0] == "its tensors by type: 2 F32, 1 MXFP4"
    assert [domain["tensors"] for domain in info["domains"]] == [[UP]] * 4
    assert "GGUF, qwen3moe" in call("inspect", source).output
    assert "Marlin" not in call("verify", source, tmp_path / "b.gguf").output
    change(tmp_path / "b.gguf", UP, 20, 0xFF)
    assert call("verify", source, tmp_path / "b.gguf").exit_code == 1
    assert call("convert", source, tmp_path / "c.gguf", "--push", "me/x").exit_code == 2


# What follows is untrusted input.


def edited(path, at, data):
    found = bytearray(path.read_bytes())
    found[at : at + len(data)] = data
    path.write_bytes(found)


def test_a_truncated_file(tmp_path):
    source = make(tmp_path / "a.gguf")
    whole = source.read_bytes()
    for length in itertools.chain(range(0, 600, 7), range(600, len(whole) - 32, 97)):
        source.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            fp4cast.inspect(source)
    source.write_bytes(whole + b"\0" * 64)
    with pytest.raises(HeaderError, match="64 bytes after the last tensor"):
        fp4cast.inspect(source)


@pytest.mark.parametrize(
    ("at", "data", "what"),
    [
        (0, b"GGML", "begins with b'GGML'"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "little-endian"),
        (8, struct.pack("<Q", 1 << 60), "bytes expected|dimensions|is truncated|stands there twice"),
        (16, struct.pack("<Q", 1 << 60), "bytes expected|unknown type|not UTF-8"),
        (24, struct.pack("<Q", 1 << 63), "bytes expected"),
    ],
)
def test_lengths_and_counts_that_lie(tmp_path, at, data, what):
    source = make(tmp_path / "a.gguf")
    edited(source, at, data)
    with pytest.raises(HeaderError, match=what):
        fp4cast.inspect(source)


def test_metadata_and_tensors_that_lie(tmp_path):
    for key, old, new, what in (
        (b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 3), struct.pack("<IIQ", 9, 8, 1 << 61), "expected, "),
        (b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 3), struct.pack("<IIQ", 9, 9, 3), "array of the type 9"),
        (b"general.file_type", struct.pack("<I", 4), struct.pack("<I", 77), "unknown type 77"),
        (b"general.file_type", b"general.file_type", b"\xff" * 17, "not UTF-8"),
        (UP.encode(), struct.pack("<I", 3), struct.pack("<I", 9), "has 9 dimensions"),
        (
            UP.encode(),
            struct.pack("<I3Q", 3, 128, 8, 4),
            struct.pack("<I3Q", 3, 120, 8, 4),
            "expected a multiple of 32",
        ),
        (UP.encode(), struct.pack("<I3Q", 3, 128, 8, 4), struct.pack("<I3Q", 3, 128, 8, 1 << 60), "is truncated"),
        (UP.encode(), struct.pack("<QI", 4, 39), struct.pack("<QI", 4, 99), "of type 99, which the installed gguf"),
        (b"blk.0.ffn_up_exps.bias", struct.pack("<Q", 2208), struct.pack("<Q", 0), "begins at 0, expected"),
    ):
        source = make(tmp_path / "a.gguf")
        whole = source.read_bytes()
        place = whole.index(key)
        position = whole.find(old, place)
        if position < 0:  # an offset: the last eight bytes of the entry
            position = whole.index(struct.pack("<I", 0), place + len(key) + 4 + 2 * 8) + 4
        edited(source, position, new)
        with pytest.raises(HeaderError, match=what):
            fp4cast.inspect(source)


def test_any_damage_is_an_error_or_no_damage(tmp_path):
    """Bytes changed at random, most of them in the header: an error of ours, or a file that both sides read alike."""
    rng = np.random.default_rng(0)
    source = make(tmp_path / "a.gguf", low=-30, high=-14)
    whole, damaged, made = np.frombuffer(source.read_bytes(), np.uint8), tmp_path / "b.gguf", tmp_path / "c.gguf"
    converted = 0
    for _ in range(400):
        data = whole.copy()
        for at in rng.integers(0, 700, rng.integers(1, 4)):
            data[at] = rng.choice([0, 1, 0x7F, 0xFF, rng.integers(256)])
        damaged.write_bytes(data.tobytes())
        try:
            assert fp4cast.convert(damaged, made, jobs=1, sync=False).exact
        except Fp4CastError:
            assert not made.exists()
        else:
            made.unlink()
            converted += 1
    assert 0 < converted < 200


def test_sizes_of_blocks_are_those_of_the_package():
    for kind, nbytes in LENGTHS.items():
        assert gguf.GGML_QUANT_SIZES[kind][1] == nbytes
