"""The way back of blocks, against every exponent tried: what is found has the same values, and nothing is missed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4cast import cast
from fp4cast.casting.turn_back import NONE, exponent_bytes, exponent_table, turn_back
from fp4cast.formats import E2M1, E4M3, mxfp4_values, nvfp4_values, pack, unpack

K = np.arange(-127, 128)
SCALES = (1.0, 2.0**-15, 2.0**-126, 2.0**120, 3.0, float(np.float32(0.7)), float(np.float32(1 / 3)))
MASKS = range(128)


def holds(tensor_scale):
    """bool [magnitude 0 to 7, E4M3 code, k]: a magnitude times s * S is a magnitude times 2^k; by trying it."""
    with np.errstate(invalid="ignore"):
        values = E2M1.values[:8, None] * E4M3.values[None] * tensor_scale
        found = np.isin(values[..., None] / 2.0**K, E2M1.values[:8])
    found[0] = True  # a code of zero asks for nothing: it is 0 under every scale that is a number
    found[:, np.signbit(E4M3.values) | np.isnan(E4M3.values)] = False
    return found


def half(mask):
    """Packed codes uint8 [8] that use a set of magnitudes, with both signs of all of them and of zero."""
    members = [i for i in range(1, 8) if mask >> (i - 1) & 1]
    codes = np.resize(np.array([0, 8, *members, *(i + 8 for i in members)], np.uint8), 16)
    return pack(codes)


def same(codes, scales, tensor_scale, turned, bias=127):
    """Which blocks have the same values on both sides, bit for bit."""
    with np.errstate(invalid="ignore"):
        before = nvfp4_values(codes, scales, tensor_scale)
        after = mxfp4_values(turned.codes, turned.exponents[:, None], bias)
    return ((before == after) & (np.signbit(before) == np.signbit(after))).all(axis=1)


def judge(codes, scales, tensor_scale, possible):
    turned = turn_back(codes, scales, tensor_scale)
    found = np.ones(len(codes), bool)
    found[turned.lost] = False
    np.testing.assert_array_equal(found, possible)
    assert same(codes, scales, tensor_scale, turned)[found].all()
    changed = (turned.codes != codes).reshape(-1, 2, 8).any(axis=2)
    assert turned.changed == changed[found].sum()


@pytest.mark.parametrize("tensor_scale", SCALES)
def test_every_set_of_magnitudes_under_every_scale(tensor_scale):
    """All 128 sets and all E4M3 codes in one half; the other holds zeros, or the magnitude 1 under a scale of 1."""
    table, one = holds(tensor_scale), int(np.flatnonzero(E4M3.values == 1.0)[0])
    every, block_of_ones = np.arange(256, dtype=np.uint8), half(0b10)
    for mask in MASKS:
        members = [i for i in range(1, 8) if mask >> (i - 1) & 1]
        alone = table[[0, *members]].all(axis=0)
        for other, scale, rest in ((half(0), one, np.ones(255, bool)), (block_of_ones, one, table[2, one])):
            codes = np.tile(np.concatenate([half(mask), other]), (256, 1))
            scales = np.stack([every, np.full(256, scale, np.uint8)], axis=1)
            judge(codes, scales, tensor_scale, (alone & rest).any(axis=1))


@pytest.mark.parametrize("tensor_scale", SCALES[:1] + SCALES[4:6])
@pytest.mark.parametrize("masks", [(0b1111111, 0b1111111), (0b1000, 0b1010), (0b1, 0b1000000), (0, 0b110), (0, 0)])
def test_every_pair_of_scales(masks, tensor_scale):
    """All 256 x 256 pairs of E4M3 codes for a pair of half-blocks."""
    table = holds(tensor_scale)
    sides = [table[[0, *(i for i in range(1, 8) if mask >> (i - 1) & 1)]].all(axis=0) for mask in masks]
    possible = (sides[0][:, None] & sides[1][None]).any(axis=2).reshape(-1)
    scales = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), axis=-1).reshape(-1, 2)
    codes = np.tile(np.concatenate([half(mask) for mask in masks]), (len(scales), 1))
    judge(codes, scales.astype(np.uint8), tensor_scale, possible)


blocks = st.lists(
    st.tuples(st.integers(0, 127), st.integers(0, 127), st.integers(0, 254), st.booleans()), min_size=1, max_size=12
)


@settings(max_examples=200, deadline=None)
@given(blocks, st.integers(0, 254), st.sampled_from([127, 125]))
def test_what_a_cast_wrote_comes_back(drawn, center, bias):
    """Values always; bytes where all exponents span 17 binades. Shifts and zero blocks of any exponent are drawn."""
    codes = np.array([np.concatenate([half(a), half(b)]) for a, b, *_ in drawn])
    near = np.array([np.clip(center - k % 18, 0, 254) if close else k for *_, k, close in drawn], np.uint8)
    written = cast(codes, near[:, None], inexact="nearest", bias=bias)
    scales = written.block_scales.reshape(-1, 2)
    turned = turn_back(written.codes, scales, written.tensor_scale, bias)
    if written.exact:
        assert not turned.lost.size
        before = mxfp4_values(codes, near[:, None], bias)
        after = mxfp4_values(turned.codes, turned.exponents[:, None], bias)
        assert (before == after).all() and (np.signbit(before) == np.signbit(after)).all()
    if int(near.max()) - int(near.min()) <= 17:
        np.testing.assert_array_equal(turned.codes, codes)
        np.testing.assert_array_equal(turned.exponents, near)
        assert not turned.changed


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=20), st.sampled_from(SCALES))
def test_exponents_are_looked_up_only_where_codes_stay(pairs, tensor_scale):
    scales, table = np.array(pairs, np.uint8), exponent_table(tensor_scale)
    found = exponent_bytes(scales, table)
    stays = (scales[:, 0] == scales[:, 1]) & (table[scales[:, 0]] != NONE)
    assert (found is not None) == stays.all()
    if found is not None:
        codes = np.random.default_rng(0).integers(0, 256, (len(scales), 16), np.uint8)
        turned = turn_back(codes, scales, tensor_scale)
        np.testing.assert_array_equal(turned.exponents, found)
        np.testing.assert_array_equal(turned.codes, codes)


def test_one_half_keeps_its_codes_where_both_cannot():
    """Two halves of the value 2 under different scales."""
    codes = np.concatenate([half(0b1000), half(0b10)])[None]  # magnitudes 2 and 1
    one, two = (int(np.flatnonzero(E4M3.values == value)[0]) for value in (1.0, 2.0))
    turned = turn_back(codes, np.array([[one, two]], np.uint8), 1.0)
    assert turned.changed == 1 and not turned.lost.size
    kept = (turned.codes == codes).reshape(2, 8).all(axis=1)
    assert kept.sum() == 1
    assert set(np.unique(unpack(turned.codes) & 7)) <= {0, 2, 4}
