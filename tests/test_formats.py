"""The slow decode is the specification; everything else equals it on every code."""

import math

import ml_dtypes
import numpy as np
import pytest

import truth
from fp4cast.formats import E2M1, E4M3, E8M0, mxfp4_values, nvfp4_values, pack, unpack

E2M1_SPEC = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def test_e2m1_is_the_table_of_the_standard():
    assert [str(E2M1.decode(code)) for code in range(16)] == [str(value) for value in E2M1_SPEC]


@pytest.mark.parametrize(
    ("code", "value"),
    [(0x00, 0.0), (0x01, 2.0**-9), (0x07, 7 * 2.0**-9), (0x08, 2.0**-6), (0x38, 1.0), (0x78, 256.0), (0x7E, 448.0)],
)
def test_e4m3_landmarks(code, value):
    assert E4M3.decode(code) == value
    assert E4M3.decode(code | 0x80) == -value


@pytest.mark.parametrize(("code", "value"), [(0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (254, 2.0**127)])
def test_e8m0_landmarks(code, value):
    assert E8M0.decode(code) == value


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [(E2M1, ml_dtypes.float4_e2m1fn), (E4M3, ml_dtypes.float8_e4m3fn), (E8M0, ml_dtypes.float8_e8m0fnu)],
    ids=lambda p: getattr(p, "name", p.__name__ if hasattr(p, "__name__") else str(p)),
)
def test_every_code_equals_ml_dtypes(fmt, dtype):
    theirs = np.arange(fmt.codes).astype(np.uint8).view(dtype).astype(np.float64)
    ours = np.array([fmt.decode(code) for code in range(fmt.codes)])
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours[~np.isnan(ours)]), np.signbit(theirs[~np.isnan(theirs)]))
    np.testing.assert_array_equal(fmt.values, ours)


@pytest.mark.parametrize("fmt", [E2M1, E4M3, E8M0], ids=lambda fmt: fmt.name)
def test_codes_out_of_range_are_refused(fmt):
    for code in (-1, fmt.codes):
        with pytest.raises(ValueError, match=fmt.name):
            fmt.decode(code)


def test_tables_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        E2M1.values[0] = 1.0


def test_unpack_is_low_nibble_first_and_pack_its_inverse():
    packed = np.arange(256, dtype=np.uint8).reshape(2, 128)
    codes = unpack(packed)
    assert codes.shape == (2, 256)
    assert codes[0, 2 * 0x21 : 2 * 0x21 + 2].tolist() == [1, 2]
    np.testing.assert_array_equal(pack(codes), packed)


def test_mxfp4_values_of_every_code_under_every_scale():
    codes = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, np.uint8), (255, 1))
    scales = np.arange(255, dtype=np.uint8)[:, None]
    values = mxfp4_values(codes, scales).reshape(-1)
    expected = truth.mxfp4(codes, scales)
    assert [float(value) for value, _ in expected] == values.tolist()
    assert [sign for _, sign in expected] == np.signbit(values).tolist()


def test_a_bias_of_125_is_four_times_the_value():
    codes, scales = np.full((1, 16), 0x12, np.uint8), np.array([[100]], np.uint8)
    np.testing.assert_array_equal(mxfp4_values(codes, scales, bias=125), 4 * mxfp4_values(codes, scales))


def test_nan_scales_decode_to_nan():
    assert np.isnan(mxfp4_values(np.full((1, 16), 0x22, np.uint8), np.array([[255]], np.uint8))).all()
    assert np.isnan(nvfp4_values(np.full((1, 8), 0x22, np.uint8), np.array([[0x7F]], np.uint8), 1.0)).all()
    assert math.isnan(E4M3.decode(0xFF))


@pytest.mark.parametrize("tensor_scale", [1.0, 2.0**-126, float(np.float32(0.1)), 2.0**121])
def test_nvfp4_values_of_every_code_under_every_scale(tensor_scale):
    codes = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8), (0x7F, 1))
    scales = np.arange(0x7F, dtype=np.uint8)[:, None]
    values = nvfp4_values(codes, scales, tensor_scale).reshape(-1)
    assert [float(value) for value, _ in truth.nvfp4(codes, scales, tensor_scale)] == values.tolist()
