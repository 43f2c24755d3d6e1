"""Headers are untrusted: one malformed file a cause. What we write, others open."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4cast.checkpoints import header as shards
from fp4cast.checkpoints import raw_header
from fp4cast.checkpoints.header import DTYPE_BITS, lay_out, read_header
from fp4cast.errors import CheckpointError, HeaderError


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_good_file_is_read(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "b": entry(offsets=(4, 8)), "a": entry()}
    shard = read_header(write(tmp_path / "x", header, bytes(8)))
    assert shard.tensors["b"].shape == (4,)
    assert shard.tensors["b"].start == shard.tensors["a"].start + 4
    assert shard.metadata == {"format": "pt"}


MALFORMED = {
    "empty file": (None, b"", "too short"),
    "header longer than the file": ({"a": entry()}, bytes(4), "claims 1000 bytes"),
    "not JSON": (b"{nope", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), b"", "not valid JSON"),
    "too deep": (b"[" * 100_000, b"", "not valid JSON"),
    "a list": (b"[]", b"", "must be a JSON object"),
    "a list of numbers": (b"[1]", b"", "must be a JSON object"),
    "a number": (b"5", b"", "must be a JSON object"),
    "null": (b"null", b"", "must be a JSON object"),
    "a lone surrogate in the metadata": (b'{"__metadata__":{"a":"\\ud800"}}', b"", "lone surrogate"),
    "a product without end": ({"a": entry(shape=[2**62] * 100_000)}, bytes(4), "takes"),
    "a product beyond floats": ({"a": entry(shape=[2**62] * 20)}, bytes(4), "takes"),
    "a name twice among many": (
        b'{"x":1,' + b",".join(b'"%d":1' % i for i in range(100_000)) + b',"x":1}',
        b"",
        "'x' occurs twice",
    ),
    "a lone surrogate": (b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "lone surrogate"),
    "a name twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "occurs twice"),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, b"", "strings to strings"),
    "metadata list": ({"__metadata__": []}, b"", "strings to strings"),
    "an entry that is a number": ({"a": 3}, b"", "expected dtype, shape and data_offsets"),
    "a missing key": ({"a": {"dtype": "U8", "shape": [4]}}, bytes(4), "expected dtype, shape and data_offsets"),
    "an extra key": ({"a": entry() | {"x": 1}}, bytes(4), "expected dtype, shape and data_offsets"),
    "an unknown dtype": ({"a": entry(dtype="F7")}, bytes(4), "unknown dtype 'F7'"),
    "a dtype that is a list": ({"a": entry() | {"dtype": []}}, bytes(4), "unknown dtype"),
    "a negative size": ({"a": entry(shape=(-4,))}, bytes(4), "list of sizes"),
    "a fractional size": ({"a": entry(shape=(4.0,))}, bytes(4), "list of sizes"),
    "a boolean size": ({"a": entry(shape=(True,), offsets=(0, 1))}, bytes(1), "list of sizes"),
    "an enormous size": ({"a": entry(shape=(2**63,))}, bytes(4), "list of sizes"),
    "an overflowing product": ({"a": entry(shape=(2**40, 2**40))}, bytes(4), "takes"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(4), "two sizes"),
    "backward offsets": ({"a": entry(offsets=(4, 0))}, bytes(4), "takes 4 bytes"),
    "too few bytes": ({"a": entry(dtype="F32")}, bytes(4), "takes 16 bytes"),
    "half a byte": ({"a": entry(dtype="F4", shape=(3,), offsets=(0, 1))}, bytes(1), "takes 1.5 bytes"),
    "a hole at the start": ({"a": entry(offsets=(4, 8))}, bytes(8), "leaves a hole of 4 bytes after the header"),
    "a hole between": ({"a": entry(), "b": entry(offsets=(6, 10))}, bytes(10), "leaves a hole of 2 bytes"),
    "an overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6), "'b' overlaps 'a'"),
    "truncated data": ({"a": entry()}, bytes(3), "describes"),
    "appended data": ({"a": entry()}, bytes(5), "describes"),
}


@pytest.mark.parametrize("cause", MALFORMED)
def test_malformed_files_are_refused(tmp_path, cause):
    header, data, message = MALFORMED[cause]
    path = tmp_path / "bad.safetensors"
    if header is None:
        path.write_bytes(data)
    else:
        write(path, header, data, length=1000 if "longer" in cause else None)
    with pytest.raises(HeaderError, match=message) as error:
        read_header(path)
    assert "bad.safetensors" in str(error.value)


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_header, "HEADER", shards.HEADER._replace(nbytes=10))
    with pytest.raises(HeaderError, match="10 are allowed"):
        read_header(write(tmp_path / "x", {"a": entry()}, bytes(4)))


def test_a_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "nothing")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_crash_the_parser(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x"
    path.write_bytes(data)
    with pytest.raises(HeaderError):
        read_header(path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_flipped_header_byte_is_read_as_the_reference_reads_it(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x"
    good = safetensors.numpy.save({"a": np.zeros((2, 3), np.float32), "b": np.ones(5, np.uint8)}, {"format": "pt"})
    at, bit = data.draw(st.integers(0, len(good) - 30)), data.draw(st.integers(0, 7))
    path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
    try:
        safetensors.numpy.load_file(path)
        reference = True
    except Exception:  # the reference raises several types
        reference = False
    try:
        read_header(path)
        ours = True
    except HeaderError:
        ours = False
    assert reference or not ours, "we accept what the reference refuses"


dtypes = st.sampled_from(sorted(d for d in DTYPE_BITS if DTYPE_BITS[d] % 8 == 0))
tensors = st.lists(st.tuples(dtypes, st.lists(st.integers(0, 4), max_size=3)), max_size=8)


@settings(max_examples=100, deadline=None)
@given(tensors)
def test_layouts_are_aligned_and_open_in_the_reference(tmp_path_factory, drawn):
    path = tmp_path_factory.mktemp("layout") / "x.safetensors"
    wanted = [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(drawn)]
    placed = lay_out(wanted, {"format": "pt"})
    path.write_bytes(placed.header + bytes(placed.size - len(placed.header)))
    assert len(placed.header) % 8 == 0
    shard = read_header(path)
    for name, dtype, shape in wanted:
        tensor = shard.tensors[name]
        assert (tensor.dtype, tensor.shape, tensor.start) == (dtype, shape, placed.offsets[name])
        assert tensor.start % (DTYPE_BITS[dtype] // 8) == 0
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {name for name, _, _ in wanted}
        assert file.metadata() == {"format": "pt"}
