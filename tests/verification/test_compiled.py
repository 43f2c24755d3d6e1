"""The compiled comparison and NumPy's find the same; a wrong kernel is not used; what cannot be read is an error."""

import ctypes
import os
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fp4cast
from fp4cast.checkpoints import tiles
from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import CheckpointError
from fp4cast.verification import compiled
from fp4cast.verification.compiled import Place, same_bytes
from helpers import flip

SMALL = tiles.Limits(tile_bytes=5000, tile_rows=7, band_rows=5, compare_blocks=50, compare_bytes=2000)
KINDS = ["gpt-oss", "deepseek-v4", "moe", "dense"]
needs_kernel = pytest.mark.skipif(compiled.kernel() is None, reason="the package was built without a C compiler")


def found(source, destination, *, kernel):
    with pytest.MonkeyPatch.context() as patch:
        if not kernel:
            patch.setattr(compiled, "kernel", lambda: None)
        return replace(fp4cast.verify(source, destination, jobs=1), seconds=0.0)


@needs_kernel
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_both_find_the_same(miniatures, converted, data):
    """Whatever is flipped, and wherever steps end."""
    kind = data.draw(st.sampled_from(KINDS))
    tensors = open_checkpoint(converted[kind]).tensors
    one = st.sampled_from(sorted(tensors)).flatmap(lambda name: st.tuples(st.just(name), _bits(tensors[name])))
    bits = data.draw(st.lists(one))
    for name, bit in bits:
        flip(tensors[name], bit)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "STEP", data.draw(st.sampled_from([1, 7, 64, 1 << 13])))
            patch.setattr(tiles, "LIMITS", data.draw(st.sampled_from([tiles.LIMITS, SMALL])))
            reports = [found(miniatures[kind], converted[kind], kernel=kernel) for kernel in (True, False)]
    finally:
        for name, bit in bits:
            flip(tensors[name], bit)
    assert_alike(*(report.to_json() for report in reports))


def assert_alike(one, other):
    """But for the order in which squared errors are added up."""
    if isinstance(one, dict | list):
        assert one.keys() == other.keys() if isinstance(one, dict) else len(one) == len(other)
        pairs = ((one[key], other[key]) for key in one) if isinstance(one, dict) else zip(one, other, strict=True)
        for pair in pairs:
            assert_alike(*pair)
    else:
        assert one == pytest.approx(other, rel=1e-12, nan_ok=True) if isinstance(one, float) else one == other


def _bits(tensor):
    return st.integers(0, 8 * tensor.nbytes - 1)


@needs_kernel
def test_a_wrong_kernel_is_not_used():
    right = compiled.kernel()

    def beside(function, wrong):
        return lambda *arguments: wrong(function(*arguments))

    assert compiled._correct(right)
    for name in ("same_bytes", "same_blocks", "same_turned"):
        for wrong in (lambda _: 0, lambda stop: stop + 8, lambda stop: max(stop - 8, 0), lambda _: 37, lambda _: 19):
            assert not compiled._correct(replace(right, **{name: beside(getattr(right, name), wrong)}))

    def without_values(function):
        return lambda *arguments: function(*arguments[:-1], ctypes.c_int())

    for name in ("same_blocks", "same_turned"):
        assert not compiled._correct(replace(right, **{name: without_values(getattr(right, name))}))


def test_no_kernel_when_asked_or_where_none_was_built(monkeypatch, tmp_path):
    load = compiled.kernel.__wrapped__
    with monkeypatch.context() as patch:
        patch.setenv("FP4CAST_NO_KERNEL", "1")
        assert load() is None
    for content in (None, b"not a library"):
        if content:
            (tmp_path / "nothing.so").write_bytes(content)
        monkeypatch.setattr(compiled, "LIBRARY", tmp_path / "nothing.so")
        assert load() is None


@needs_kernel
def test_it_is_checked_where_there_is_no_memfd_and_not_used_where_there_is_no_file(monkeypatch):
    right = compiled.kernel()
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert compiled._correct(right)

    def nowhere():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "TemporaryFile", nowhere)
    assert not compiled._correct(right)


@needs_kernel
@pytest.mark.parametrize("size", [0, 1, 100, 4096, 5000])
def test_it_stops_where_a_file_ends(tmp_path, size):
    """And leaves the error to who reads there."""
    data = np.arange(5000, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data[:size])
    with File(tmp_path / "a") as a, File(tmp_path / "b") as b, pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "STEP", 256)  # 4096 bytes
        same = same_bytes(Place(a, 0), Place(b, 0), 5000)
        assert same == {4096: 4096, 5000: 5000}.get(size, 0)
        if size < 5000:
            with pytest.raises(CheckpointError, match="truncated while it was read"):
                b.read(same, 5000 - same)


def test_what_is_truncated_while_it_is_read_is_an_error(miniatures, tmp_path, monkeypatch):
    """The kernel gives no sign of it."""
    from fp4cast.verification import verify as module

    path = tmp_path / "dst"
    fp4cast.convert(miniatures["moe"], path)
    open_both = module.open_both

    def and_truncate(*arguments):
        opened = open_both(*arguments)
        shard = next(iter(opened.destination.shards.values())).path
        os.truncate(shard, shard.stat().st_size - 1)
        return opened

    monkeypatch.setattr(module, "open_both", and_truncate)
    with pytest.raises(CheckpointError, match="truncated while it was read"):
        fp4cast.verify(miniatures["moe"], path)
