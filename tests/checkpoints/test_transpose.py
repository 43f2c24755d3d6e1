"""The compiled transpose and NumPy's are one function, on every shape; a wrong kernel is not used."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4cast.checkpoints import transpose as module
from fp4cast.checkpoints.transpose import Kernel, compiled, is_transpose, transpose

needs_kernel = pytest.mark.skipif(not compiled(), reason="the package was built without a C compiler")
sizes = st.integers(0, 70)


@pytest.fixture(params=["compiled", "numpy"])
def way(request, monkeypatch):
    """Both ways in turn."""
    if request.param == "numpy":
        monkeypatch.setattr(module, "_KERNEL", None)
    elif not compiled():
        pytest.skip("the package was built without a C compiler")


def check(rows: int, columns: int, left: int, right: int, seed: int) -> None:
    """A part of a matrix into a part of another, whose other bytes stay."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(0, 256, (rows, left + columns + right), np.uint8)
    matrix, out = whole[:, left : left + columns], rng.integers(0, 256, (columns, right + rows + left), np.uint8)
    expected = out.copy()
    expected[:, right : right + rows] = matrix.T
    transpose(matrix, out[:, right : right + rows])
    assert np.array_equal(out, expected)
    turned = out[:, right : right + rows]
    assert is_transpose(matrix, turned)
    if turned.size:
        turned.flat[seed % turned.size] ^= 1 << seed % 8
        assert not is_transpose(matrix, turned)


@given(sizes, sizes, st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_any_shape_at_any_alignment(rows, columns, left, right, seed):
    check(rows, columns, left, right, seed)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", range(35))
def test_every_remainder(rows):
    for columns in range(35):
        check(rows, columns, 1, 3, rows)


@pytest.mark.usefixtures("way")
def test_matrices_that_the_kernel_does_not_take_are_turned_too():
    words = np.arange(600, dtype=np.uint16).reshape(20, 30)
    for matrix in (words, words.astype(np.uint8)[:, ::-1], words.astype(np.uint8).T, words.astype(np.uint8)[::-1]):
        out = np.zeros(matrix.shape[::-1], matrix.dtype)
        transpose(matrix, out)
        assert np.array_equal(out, matrix.T) and is_transpose(matrix, out)


@pytest.mark.usefixtures("way")
def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\).*\(2, 3\)"):
        transpose(np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\).*\(2, 3\)"):
        is_transpose(np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8))


@pytest.mark.usefixtures("way")
def test_one_bit_anywhere_is_found():
    matrix = np.random.default_rng(0).integers(0, 256, (37, 41), np.uint8)
    turned = matrix.T.copy()
    for position in range(turned.size):
        turned.flat[position] ^= 0x10
        assert not is_transpose(matrix, turned)
        turned.flat[position] ^= 0x10
    assert is_transpose(matrix, turned)


@needs_kernel
def test_a_wrong_kernel_is_not_used():
    right = module._KERNEL

    def off_by_one(source, rows, columns, stride, target, target_stride):
        right.write(source, rows, columns, stride, target, target_stride)
        ctypes.memset(target + target_stride * (columns - 1) + rows - 1, 0, 1)

    assert module._correct(right)
    assert not module._correct(Kernel(off_by_one, right.compare))
    assert not module._correct(Kernel(lambda *_: None, right.compare))
    assert not module._correct(Kernel(right.write, lambda *_: 1))
    assert not module._correct(Kernel(right.write, lambda *_: 0))


def test_no_kernel_when_asked(monkeypatch):
    monkeypatch.setenv("FP4CAST_NO_KERNEL", "1")
    assert module._load() is None


def test_no_kernel_where_none_was_built(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "LIBRARY", tmp_path / "nothing.so")
    assert module._load() is None
    (tmp_path / "nothing.so").write_bytes(b"not a library")
    assert module._load() is None
