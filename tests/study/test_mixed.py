"""Mixed formats: FP8, MXFP4 and NVFP4 of the same weights, against ml_dtypes and what `convert` writes."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fp4cast.conversion.fp8_blocks import fp8_codes, fp8_scales
from fp4cast.formats import E4M3
from fp4cast.study import mixed
from fp4cast.study.added import ADDED
from fp4cast.study.scenarios import ORIGINAL, generator
from standard import equally_near, standard_nvfp4

KEPT = Path(__file__).parents[2] / "docs" / "study" / "study.json"


def weights_of(name):
    scenario = next(s for s in ORIGINAL if s.name == name)
    return mixed.bf16(np.asarray(scenario.weights(generator(name)), np.float64))


MADE_UP = [name for name in mixed.MIXED if name != "real weights"]


def test_bf16_is_that_of_ml_dtypes():
    x = np.random.default_rng(0).standard_normal(9999) * 2.0 ** np.linspace(-99, 99, 9999)
    x = np.concatenate([x.astype(np.float32), [0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -(2 - 2.0**-9)]])
    assert np.array_equal(mixed.bf16(x), x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(float))


@pytest.mark.parametrize("name", MADE_UP)
def test_fp8_is_what_convert_writes_and_ml_dtypes_rounds(name):
    x = weights_of(name)
    ours = mixed.fp8(x)
    for first in range(0, x.shape[0], 128):
        stripe = x[first : first + 128]
        bits = stripe.astype(ml_dtypes.bfloat16).view(np.uint16)
        scales = fp8_scales(bits)
        wide = np.repeat(scales, 128).astype(float)
        assert np.array_equal(ours[first : first + 128], E4M3.values[fp8_codes(bits, scales)] * wide)
        quotients = (stripe / wide).astype(ml_dtypes.bfloat16)
        theirs = quotients.astype(np.float32).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(float) * wide
        assert np.array_equal(ours[first : first + 128], theirs)


@pytest.mark.parametrize("name", MADE_UP)
def test_four_bits_are_those_of_ml_dtypes(name):
    x = weights_of(name)
    assert equally_near(x.reshape(-1), mixed.nvfp4(x).reshape(-1), standard_nvfp4(x))
    blocks = x.reshape(-1, 32)
    scales = 2.0 ** np.ceil(np.log2(np.abs(blocks).max(axis=1, keepdims=True) / 6))
    theirs = (blocks / scales).astype(ml_dtypes.float4_e2m1fn).astype(float) * scales
    assert np.array_equal(mixed.mxfp4(x), theirs.reshape(x.shape))


def test_signal_to_noise_is_that_of_the_values():
    """By another formula, on the weights and the kept figures; blocks that are made up have none."""
    by_name = {each["name"]: each["snr_db"] for each in json.loads(KEPT.read_text())["mixed"]}
    assert set(by_name) == set(mixed.MIXED)
    for name in MADE_UP:
        x = weights_of(name)
        for label, written in mixed.FORMATS.items():
            noise = np.linalg.norm(written(x) - x) / np.linalg.norm(x)
            assert by_name[name][label] == pytest.approx(-20 * np.log10(noise), abs=1e-6)
    with pytest.raises(ValueError, match="has no weights before MXFP4"):
        mixed.compare(next(s for s in ADDED if s.name == "zero blocks"))
