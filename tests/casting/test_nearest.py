"""Where nothing is exact: least error, measured against brute force and against the other algorithms."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fp4cast
import truth
from fp4cast.casting import nearest
from fp4cast.casting.nearest import _candidates, choose_nearest, encode, squared_error
from fp4cast.casting.tight_rule import ArrayBlocks, choose
from fp4cast.formats import mxfp4_values, nvfp4_values, pack, unpack


@st.composite
def wide_domains(draw):
    n = draw(st.integers(2, 6))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    spread = draw(st.sampled_from([18, 19, 21, 25, 30, 40]))
    base = draw(st.integers(20, 150))
    scales = base + rng.integers(0, spread + 1, n)
    scales[0], scales[-1] = base, base + spread
    codes = rng.choice(draw(st.sampled_from([range(16), [0, 1, 9, 4], [7, 15, 3], [0, 0, 0, 6]])), (n, 32))
    return pack(codes.astype(np.uint8)), scales.astype(np.uint8)


def error_of(codes, scales, out_codes, out_scales, tensor_scale):
    source = mxfp4_values(codes, scales[:, None])
    return float(((source - nvfp4_values(out_codes, out_scales, tensor_scale)) ** 2).sum())


def e4m3(x):
    return np.clip(x, 2.0**-9, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)


def e2m1(x):
    return np.clip(x, -6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)


def requantize(values, block_scale, tensor_scale):
    """Round to nearest under given scales: codes and block scales as they would be written."""
    s = block_scale.astype(np.float64) * tensor_scale
    codes = e2m1(values.reshape(-1, 16) / np.repeat(s, 16).reshape(-1, 16)).view(np.uint8)
    return float(
        ((values.reshape(-1, 16) - codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * s[:, None]) ** 2).sum()
    )


def algorithm_1(codes, scales):
    values = mxfp4_values(codes, scales[:, None]).astype(ml_dtypes.bfloat16).astype(np.float32).astype(np.float64)
    tensor_scale = float(np.float32(np.abs(values).max()) / np.float32(2688))
    amax = np.abs(values.reshape(-1, 16)).max(axis=1)
    return requantize(values, e4m3(np.where(amax == 0, 1.0, amax / (6 * tensor_scale))), tensor_scale)


def algorithm_2(codes, scales, m):
    k = scales.astype(np.int64) - 127
    written = 2.0 ** (m + np.clip(k - m, -9, 8))
    magnitudes = mxfp4_values(codes, np.full((len(scales), 1), 127, np.uint8))
    return float(((magnitudes * (2.0**k - written)[:, None]) ** 2).sum())


def algorithm_3(codes, scales, m):
    k = np.repeat(scales.astype(np.int64) - 127, 2)
    values = mxfp4_values(codes, scales[:, None]).reshape(-1, 16)
    inside = (k - m >= -9) & (k - m <= 8)
    amax = np.abs(values).max(axis=1)
    scale = e4m3(np.where(amax == 0, 1.0, amax / (6 * 2.0**m)))
    return sum(requantize(values[i], scale[i : i + 1], 2.0**m) for i in np.flatnonzero(~inside))


@settings(max_examples=120, deadline=None)
@given(wide_domains())
def test_never_worse_than_algorithms_1_2_and_3(domain):
    codes, scales = domain
    out = fp4cast.cast(codes, scales[:, None], inexact="nearest")
    ours = error_of(codes, scales, out.codes, out.block_scales, out.tensor_scale)
    k = scales.astype(int) - 127
    others = [algorithm_1(codes, scales)]
    others += [algorithm_2(codes, scales, m) for m in range(int(k.min()) - 10, int(k.max()) + 10)]
    others += [algorithm_3(codes, scales, m) for m in range(int(k.min()) - 8, int(k.max()) + 8)]
    assert ours <= min(others) * (1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(wide_domains())
def test_no_integer_m_at_all_is_better(domain):
    codes, scales = domain
    blocks = [ArrayBlocks("x", codes, scales)]
    scaling = choose_nearest(blocks)
    assume(not scaling.exact)
    ours = squared_error(blocks, scaling.tensor_scale, scaling.m, float("inf"))
    for m in range(-126, 128):
        assert ours <= squared_error(blocks, 2.0**m, m, float("inf")) * (1 + 1e-12)


@settings(max_examples=12, deadline=None)
@given(wide_domains())
def test_every_rounded_half_block_has_the_least_error_of_all_126_scales(domain):
    codes, scales = domain
    scaling = choose_nearest([ArrayBlocks("x", codes, scales)])
    encoded = encode(codes, scales, scaling)
    source = truth.mxfp4(codes, scales)
    written = truth.nvfp4(encoded.codes, encoded.block_scales, scaling.tensor_scale)
    magnitudes = (unpack(codes).reshape(-1, 16) & 7).tolist()
    total = Fraction(0)
    for i, (half, k) in enumerate(zip(magnitudes, np.repeat(scales, 2).astype(int) - 127, strict=True)):
        part = slice(16 * i, 16 * i + 16)
        error = sum(((a - b) ** 2 for (a, _), (b, _) in zip(source[part], written[part], strict=True)), Fraction(0))
        assert error == truth.best_half_block_error(half, int(k), Fraction(scaling.tensor_scale))
        total += error
    assert encoded.squared_error == pytest.approx(float(total), rel=1e-12)
    assert [sign for _, sign in source] == [sign for _, sign in written], "rounding never changes a sign"


@settings(max_examples=60, deadline=None)
@given(wide_domains())
def test_exact_half_blocks_keep_their_values_and_verbatim_ones_their_bytes(domain):
    codes, scales = domain
    blocks = [ArrayBlocks("x", codes, scales)]
    scaling = choose_nearest(blocks)
    assume(scaling.m is not None)
    encoded = encode(codes, scales, scaling)
    inside = np.abs(scales.astype(int) - 127 - scaling.m + 0.5) <= 8.5
    np.testing.assert_array_equal(encoded.codes[inside], codes[inside])


@pytest.mark.parametrize("unit", [1.0, 0.75, 2.0**-12, 2.0**9, float(np.float32(1 / 3)), 0.0078125])
def test_candidates_round_to_nearest_even_like_fractions(unit):
    codes, errors = _candidates(unit)
    for i, scale in enumerate(truth.POSITIVE_E4M3):
        for c in range(8):
            ratio = scale * Fraction(unit)
            nearest = truth.round_e2m1(truth.MAGNITUDES[c] / ratio)
            assert truth.MAGNITUDES[codes[i, c]] == nearest
            assert errors[i, c] == pytest.approx(float((truth.MAGNITUDES[c] - ratio * nearest) ** 2), rel=1e-15, abs=0)


def test_one_extreme_outlier_takes_the_continuous_scale():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (4, 16), np.uint8)
    codes[0], codes[0, 0] = 0, 0x05
    scales = np.array([127 + 40, 100, 100, 100], np.uint8)
    out = fp4cast.cast(codes, scales[:, None], inexact="nearest")
    assert not out.exact
    assert error_of(codes, scales, out.codes, out.block_scales, out.tensor_scale) <= algorithm_1(codes, scales)


def test_the_continuous_scale_of_the_largest_values_does_not_overflow():
    codes = np.array([[0x77] * 16, [0x71] * 16, [0x13] * 16], np.uint8)
    scales = np.array([254, 254 - 40, 254 - 60], np.uint8)
    out = fp4cast.cast(codes, scales[:, None], inexact="nearest")
    assert np.isfinite(out.tensor_scale)
    assert error_of(codes, scales, out.codes, out.block_scales, out.tensor_scale) < float("inf")


def test_an_exact_domain_is_cast_exactly_under_nearest_too():
    codes, scales = np.full((2, 16), 0x44, np.uint8), np.array([[120], [101]], np.uint8)
    assert fp4cast.cast(codes, scales, inexact="nearest").exact


def test_the_error_of_a_scale_stops_early():
    rng = np.random.default_rng(0)
    source = ArrayBlocks("x", rng.integers(0, 256, (9000, 16), np.uint8), rng.integers(60, 120, 9000).astype(np.uint8))
    assert squared_error([source], 2.0**-60, -60, 0.0) == float("inf")


def test_nearest_of_an_exact_domain_equals_choose():
    source = ArrayBlocks("x", np.full((3, 16), 0x11, np.uint8), np.array([100, 110, 119], np.uint8))
    assert choose_nearest([source]) == choose([source])[0]


def test_very_many_exponents_take_few_rounds(monkeypatch):
    """250 candidates for S times 250 exponents were 62,500 rounds, also of a small tensor."""
    rounds, best = [0], nearest._best
    monkeypatch.setattr(nearest, "_best", lambda *args: (rounds.__setitem__(0, rounds[0] + 1), best(*args))[1])
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 256, (64, 512), dtype=np.uint8), rng.integers(0, 255, (64, 32), dtype=np.uint8)
    fp4cast.cast(codes, scales, inexact="nearest")
    assert rounds[0] < 2000
