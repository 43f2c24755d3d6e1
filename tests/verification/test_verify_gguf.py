"""Verification of GGUF files: whatever differs is found, by the `gguf` package's own reader and dequantizers."""

import numpy as np
import pytest

pytest.importorskip("gguf")

from gguf import GGUFReader

import fp4cast
from fp4cast.checkpoints.gguf_file import read_header
from fp4cast.errors import CheckpointError, UsageError
from fp4cast.verification.files import verify_files
from fp4cast.verification.gguf_reader import read_gguf
from gguf_files import change, make, tensors

UP, SCALE = "blk.0.ffn_up_exps.weight", "blk.0.ffn_up_exps.scale"


@pytest.fixture
def both(tmp_path):
    source = make(tmp_path / "a.gguf", low=-30, high=-14)
    fp4cast.convert(source, tmp_path / "b.gguf")
    return source, tmp_path / "b.gguf"


def kinds(both):
    report = fp4cast.verify(*both)
    assert report.ok == (not report.differences)
    return {(each.name, each.kind) for each in report.differences}


def test_nothing_differs(both):
    assert kinds(both) == set()


def test_every_bit_of_a_block_counts(both):
    block = tensors(both[1])[UP].data.reshape(-1)[:36].copy()
    for at in range(36):
        for bit in range(8):
            change(both[1], UP, at, block[at] ^ (1 << bit))
            assert kinds(both) == {(UP, "values")}, (at, bit)
        change(both[1], UP, at, block[at])
    assert kinds(both) == set()


def test_the_sign_of_a_zero_counts(tmp_path):
    source = make(tmp_path / "a.gguf")
    change(source, UP, 1, 0x80)
    fp4cast.convert(source, tmp_path / "b.gguf")
    (at,) = np.flatnonzero((tensors(tmp_path / "b.gguf")[UP].data.reshape(-1)[4:12] & 15) == 0)[:1]
    change(tmp_path / "b.gguf", UP, 4 + int(at), tensors(tmp_path / "b.gguf")[UP].data.reshape(-1)[4 + at] ^ 8)
    assert kinds((source, tmp_path / "b.gguf")) == {(UP, "values")}


def test_what_was_carried_over(both):
    change(both[1], "token_embd.weight", 9, 0x11)
    change(both[1], "blk.0.ffn_up_exps.bias", 0, 0x12)
    assert kinds(both) == {("token_embd.weight", "bytes"), ("blk.0.ffn_up_exps.bias", "bytes")}


@pytest.mark.parametrize(("value", "kind"), [(0x35, (UP, "values")), (0xFF, (SCALE, "scale"))])
def test_tensor_scales(both, value, kind):
    change(both[1], SCALE, 7, value)  # the second expert's sign and exponent
    assert kind in kinds(both)


def test_metadata(both):
    header = read_header(both[1])
    for key, found in header.values.items():
        whole = both[1].read_bytes()
        at = 24 + found.start + (8 if found.type == 8 else 0)
        at += 20 if key == "tokenizer.ggml.tokens" else 12 if key == "tokenizer.ggml.scores" else 0
        if found.type == 8 and not found.content:
            continue
        if key == "general.architecture":
            continue  # then llama.cpp applies no scale, which is another difference
        with both[1].open("r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 1]))
        assert (key, "config") in kinds(both), key
        both[1].write_bytes(whole)
    assert kinds(both) == set()


def test_a_scale_that_llama_cpp_would_not_apply(tmp_path):
    """gpt-oss's graph does not pass it on: what such a file holds is lost where it is served."""
    source = make(tmp_path / "a.gguf", low=-30, high=-14, architecture="qwen3moe")
    fp4cast.convert(source, tmp_path / "b.gguf")
    for path in (source, tmp_path / "b.gguf"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"qwen3moe", b"qwen3xyz"))
    assert (SCALE, "unexpected") in kinds((source, tmp_path / "b.gguf"))


def test_tensors_that_are_missing_or_of_another_kind(both):
    other = make(both[0].with_name("c.gguf"), {"blk.7.x.weight": np.ones((2, 32), np.float32)}, low=-30, high=-14)
    assert ("blk.7.x.weight", "missing") in kinds((other, both[1]))
    assert (UP, "dtype") in kinds((both[1], both[0]))


def test_a_file_compared_with_itself_was_not_cast(both):
    assert kinds((both[0], both[0])) == {(str(both[0]), "dtype")}


def test_what_cannot_be_compared(both, tmp_path, miniatures):
    with pytest.raises(UsageError, match="has no receipt; name its source"):
        verify_files(both[1])
    with pytest.raises(CheckpointError, match="No such file"):
        fp4cast.verify(both[0], tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="no GGUF file"):
        fp4cast.verify(both[0], miniatures["gpt-oss"])


def test_the_reader_sees_what_was_written(both):
    """An independent sum: every tensor of the file, by the package alone."""
    reader = GGUFReader(both[1])
    assert reader.fields["general.file_type"].contents() == 39
    assert [tensor.data_offset % 32 for tensor in reader.tensors] == [0, 0, 0, 0]


def test_a_vocabulary_is_one_object(both):
    """The package's reader makes several of each word: 13 seconds and 1 GB for gpt-oss's. All else is the same."""
    ours, theirs = read_gguf(both[1]), GGUFReader(both[1])
    assert [len(ours.fields[f"tokenizer.ggml.{name}"].parts) for name in ("tokens", "scores")] == [4, 4]
    assert len(theirs.fields["tokenizer.ggml.tokens"].parts) > 8
    assert list(ours.fields) == list(theirs.fields)
    for key, entry in theirs.fields.items():
        assert b"".join(part.tobytes() for part in entry.parts) == b"".join(
            part.tobytes() for part in ours.fields[key].parts
        )
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.name, one.data_offset, one.n_bytes) == (other.name, other.data_offset, other.n_bytes)
