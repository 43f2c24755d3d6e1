"""The tight rule against brute force, in both directions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fp4cast
import truth
from fp4cast.casting import tight_rule as exact
from fp4cast.casting.nearest import encode
from fp4cast.casting.tight_rule import (
    ArrayBlocks,
    choose,
    choose_unscaled,
    half_masks,
    scale_table,
    shift_bounds,
    shift_codes,
)
from fp4cast.errors import InexactError, ScaleError, ShapeError, UsageError
from fp4cast.formats import E4M3, unpack

SETS = [frozenset(c for c in range(1, 8) if mask >> c & 1) for mask in range(2, 256, 2)]


def set_values(members):
    return {float(truth.MAGNITUDES[c]) for c in members}


def spec_a_max(members):
    values = set_values(members)
    for a, allowed in ((3, {4}), (2, {2, 4, 6}), (1, {1, 2, 3, 4, 6})):
        if values <= allowed:
            return a
    return 0


def spec_a_min(members):
    values = set_values(members)
    for a, allowed in ((-3, {0.5}), (-2, {0.5, 1, 1.5}), (-1, {0.5, 1, 1.5, 2, 3})):
        if values <= allowed:
            return a
    return 0


def half_of(members):
    """A half-block that holds every magnitude of a set, zeros and signs mixed in."""
    codes = [c | (8 if i % 2 else 0) for i, c in enumerate(sorted(members))]
    codes += [0, 8] * ((16 - len(codes)) // 2) + [0] * (len(codes) % 2)
    return np.array([codes[2 * i] | codes[2 * i + 1] << 4 for i in range(8)], np.uint8)


def test_there_are_127_code_sets():
    assert len(SETS) == 127


@pytest.mark.parametrize("members", SETS, ids=lambda s: "".join(map(str, sorted(s))))
def test_shift_tables_are_those_of_the_specification(members):
    mask = half_masks(half_of(members)[None])
    a_min, a_max = shift_bounds(mask)
    assert (a_min[0], a_max[0]) == (spec_a_min(members), spec_a_max(members))


@pytest.mark.parametrize("members", SETS, ids=lambda s: "".join(map(str, sorted(s))))
def test_window_equals_brute_force_over_every_scale(members):
    """For every exponent offset: representable if and only if -9 - a_max <= k - m <= 8 - a_min."""
    a_min, a_max = spec_a_min(members), spec_a_max(members)
    for e in range(-40, 41):
        assert truth.representable(members, e, Fraction(1)) == (-9 - a_max <= e <= 8 - a_min), e


@pytest.mark.parametrize("members", [s for s in SETS if not s <= {3, 5, 7}], ids=lambda s: "".join(map(str, sorted(s))))
def test_no_other_tensor_scale_helps_a_set_with_a_magnitude_outside_of_1_5_3_6(members):
    # s * S * c' = c * 2^k with dyadic S: the odd part of S divides that of c, so it is 1 or 3.
    for e in range(-16, 16):
        assert not truth.representable(members, e, Fraction(3))


@pytest.mark.parametrize("members", SETS, ids=lambda s: "".join(map(str, sorted(s))))
def test_every_allowed_shift_keeps_every_value(members):
    half = half_of(members)[None]
    a_min, a_max = spec_a_min(members), spec_a_max(members)
    for a in range(a_min, a_max + 1):
        shifted = shift_codes(half, np.array([a]))
        for before, after in zip(truth.nibbles(half), truth.nibbles(shifted), strict=True):
            assert truth.e2m1(after) * truth.power(a) == truth.e2m1(before)
            assert after & 8 == before & 8


@pytest.mark.parametrize("m", [-126, -100, -1, 0, 7, 119])
@pytest.mark.parametrize("bias", [127, 125])
def test_scale_table_of_every_byte(m, bias):
    table = scale_table(m, bias)
    for b in range(255):
        e = min(max(b - bias - m, -9), 8)
        assert E4M3.decode(int(table[b])) == 2.0**e
    assert table[255] == 0x7F


def half_codes(draw):
    members = draw(st.sampled_from([[0, 8], [6], [0, 4, 6, 7], [1, 3], [1], [2, 4, 5, 6, 7], list(range(16))]))
    return draw(st.lists(st.sampled_from(members), min_size=32, max_size=32))


@st.composite
def domains(draw, spread=22):
    n = draw(st.integers(1, 5))
    base = draw(st.sampled_from([0, 3, 100, 120, 254 - spread]))
    scales = draw(st.lists(st.integers(0, spread).map(lambda d: base + d), min_size=n, max_size=n))
    scales = [draw(st.integers(0, 254)) if draw(st.integers(0, 9)) == 0 else b for b in scales]
    codes = np.array([half_codes(draw) for _ in range(n)], np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, np.array(scales, np.uint8)


def sets_of(codes, scales):
    halves = unpack(codes).reshape(-1, 16) & 7
    return [
        (frozenset(half.tolist()) - {0}, int(b) - 127)
        for half, b in zip(halves, np.repeat(scales, 2), strict=True)
        if half.any()
    ]


def exact_somewhere(codes, scales):
    sets = sets_of(codes, scales)
    tensor_scales = [truth.power(m) for m in range(-149, 128)]
    return any(all(_representable(members, k, scale) for members, k in sets) for scale in tensor_scales)


_cache = {}


def _representable(members, k, scale):
    key = (members, truth.power(k) / scale)
    if key not in _cache:
        _cache[key] = truth.representable(members, 0, scale / truth.power(k))
    return _cache[key]


@settings(max_examples=250, deadline=None)
@given(domains())
def test_cast_is_exact_if_and_only_if_brute_force_finds_a_tensor_scale(domain):
    codes, scales = domain
    possible = exact_somewhere(codes, scales)
    try:
        out = fp4cast.cast(codes, scales[:, None])
    except InexactError:
        assert not possible
        return
    assert possible
    assert out.exact
    assert out.rounded == 0
    assert truth.nvfp4(out.codes, out.block_scales, out.tensor_scale) == truth.mxfp4(codes, scales)
    assert out.tensor_scale >= 2.0**-126, "a subnormal tensor scale is flushed to zero on a GPU"


@settings(max_examples=250, deadline=None)
@given(domains(), st.integers(-30, 2))
def test_without_a_tensor_scale_it_is_exact_if_and_only_if_every_half_block_is_by_brute_force(domain, low):
    codes, scales = domain
    scales = np.minimum(scales.astype(np.int64) - scales.min() + 127 + low, 254).astype(np.uint8)
    scaling, _ = choose_unscaled([ArrayBlocks("x", codes, scales)])
    assert scaling.exact == all(_representable(members, k, truth.power(0)) for members, k in sets_of(codes, scales))
    if scaling.exact:
        out = encode(codes, scales, scaling)
        assert (scaling.tensor_scale, out.rounded) == (1.0, 0)
        assert truth.nvfp4(out.codes, out.block_scales.reshape(len(codes), 2), 1.0) == truth.mxfp4(codes, scales)


@settings(max_examples=150, deadline=None)
@given(domains(spread=17))
def test_a_spread_of_17_keeps_every_byte_and_takes_the_closed_form(domain):
    codes, scales = domain
    if int(scales.max()) - int(scales.min()) > 17:
        return
    out = fp4cast.cast(codes, scales[:, None])
    assert out.codes is codes
    assert out.tensor_scale == 2.0 ** max(int(scales.max()) - 127 - 8, -126)
    assert out.shifted == 0


class Unreadable(ArrayBlocks):
    def codes(self, blocks):  # noqa: ARG002
        raise AssertionError("codes were read although the exponents decide")


def test_codes_are_not_read_when_exponents_decide():
    rng = np.random.default_rng(0)
    source = Unreadable("x", rng.integers(0, 256, (1000, 16), np.uint8), rng.integers(100, 118, 1000).astype(np.uint8))
    scaling, search = choose([source])
    assert (scaling.exact, scaling.verbatim, search) == (True, True, None)


class Counting(ArrayBlocks):
    seen = 0

    def codes(self, blocks):
        Counting.seen += len(blocks)
        return super().codes(blocks)


def test_only_blocks_that_can_matter_are_read():
    rng = np.random.default_rng(0)
    scales = rng.integers(105, 118, 100_000).astype(np.uint8)
    scales[[10, 20_000]] = 0, 99  # a zero block as ModelOpt writes it, and one 18 below the top
    codes = rng.integers(0, 256, (100_000, 16), np.uint8)
    codes[10], codes[20_000] = 0, 0x75
    Counting.seen = 0
    scaling, _ = choose([Counting("x", codes, scales)])
    assert scaling.exact
    assert Counting.seen < 3 * exact._BATCH


def test_the_search_does_not_depend_on_how_the_tensor_is_cut():
    rng = np.random.default_rng(1)
    scales = rng.integers(96, 118, 4000).astype(np.uint8)
    codes = rng.choice(np.array([0x00, 0x60, 0x75, 0x44], np.uint8), (4000, 16))
    whole = choose([ArrayBlocks("x", codes, scales)])[0]
    for chunk in (1, 7, 1000):
        assert choose([ArrayBlocks("x", codes, scales, chunk=chunk)])[0] == whole
    halves = [ArrayBlocks("a", codes[:1500], scales[:1500]), ArrayBlocks("b", codes[1500:], scales[1500:])]
    assert choose(halves)[0] == whole


@pytest.mark.parametrize("b", [0, 1, 126, 200, 254])
def test_the_exponent_byte_of_a_zero_block_never_moves_m(b):
    codes = np.full((40, 16), 0x71, np.uint8)
    scales = np.linspace(110, 125, 40).astype(np.uint8)
    plain = fp4cast.cast(codes, scales[:, None])
    codes[7], scales[7] = 0x80, b
    out = fp4cast.cast(codes, scales[:, None])
    if not 107 <= b <= 126:
        assert out.tensor_scale == plain.tensor_scale
    assert out.exact
    assert truth.nvfp4(out.codes, out.block_scales, out.tensor_scale) == truth.mxfp4(codes, scales)


def test_byte_0_with_codes_is_2_to_the_minus_127():
    codes, scales = np.full((2, 16), 0x21, np.uint8), np.array([[0], [5]], np.uint8)
    out = fp4cast.cast(codes, scales)
    assert truth.nvfp4(out.codes, out.block_scales, out.tensor_scale) == truth.mxfp4(codes, scales)


def test_the_lowest_tensor_keeps_a_normal_tensor_scale():
    out = fp4cast.cast(np.full((1, 16), 0x77, np.uint8), np.array([[0]], np.uint8))
    assert out.tensor_scale == 2.0**-126
    assert truth.nvfp4(out.codes, out.block_scales, out.tensor_scale)[0][0] == 6 * truth.power(-127)


def test_byte_255_is_an_error_with_its_block():
    scales = np.full((3, 4), 120, np.uint8)
    scales[1, 2] = 255
    with pytest.raises(ScaleError, match="block 6 has scale byte 255"):
        fp4cast.cast(np.zeros((3, 64), np.uint8), scales)


def test_a_tensor_of_zeros_is_exact_whatever_its_exponents():
    scales = np.array([[0, 254, 126, 3]], np.uint8)
    codes = np.full((1, 64), 0x80, np.uint8)
    out = fp4cast.cast(codes, scales)
    assert (out.exact, out.tensor_scale, out.codes is codes) == (True, 1.0, True)
    assert truth.nvfp4(out.codes, out.block_scales, 1.0) == truth.mxfp4(codes, scales)


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (np.zeros((2, 16), np.int8), np.zeros((2, 1), np.uint8)),
        (np.zeros((2, 16), np.uint8), np.zeros((2, 1), np.float32)),
        (np.zeros((2, 8), np.uint8), np.zeros((2, 1), np.uint8)),
        (np.zeros((3, 16), np.uint8), np.zeros((2, 1), np.uint8)),
        (np.zeros((0, 16), np.uint8), np.zeros((0, 1), np.uint8)),
        ([[1]], np.zeros((2, 1), np.uint8)),
    ],
)
def test_cast_refuses_arrays_that_do_not_fit(codes, scales):
    with pytest.raises(ShapeError):
        fp4cast.cast(codes, scales)


def test_cast_refuses_an_unknown_mode():
    with pytest.raises(UsageError, match="nearest"):
        fp4cast.cast(np.zeros((1, 16), np.uint8), np.zeros((1, 1), np.uint8), inexact="round")


def test_smallest_shift_is_taken():
    codes = np.stack([np.full(16, 0x77, np.uint8), np.full(16, 0x66, np.uint8)])
    scales = np.array([120, 120 - 19], np.uint8)  # {4} may move by up to 3; 2 suffices
    scaling, _ = choose([ArrayBlocks("x", codes, scales)])
    encoded = encode(codes, scales, scaling)
    assert encoded.codes[1].tolist() == [0x22] * 16
    assert encoded.block_scales[1].tolist() == [0x01, 0x01]
    assert (encoded.shifted, encoded.rounded) == (2, 0)
