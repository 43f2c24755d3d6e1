"""Activation scales: a number, a mapping, a file; nothing usable is an error before a byte is written."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import fp4cast
from fp4cast.conversion.input_scales import load_input_scales
from fp4cast.errors import InputScaleError, UsageError


def test_a_number_is_the_input_scale_itself():
    assert load_input_scales("0.5").scale(["a"]) == np.float32(0.5)
    assert load_input_scales(1.0).scale(["a"]) == np.float32(1)


def test_a_mapping_holds_amax_and_merged_projections_take_the_largest():
    scales = load_input_scales({"a.w1": 2688.0, "a.w3": 5376.0})
    assert scales.scale(["a.w1", "a.w3"]) == np.float32(2)
    assert scales.scale(["a.w1"]) == np.float32(1)


def test_files_of_both_kinds(tmp_path):
    (tmp_path / "amax.json").write_text(json.dumps({"a": 2688}))
    tensors = {
        "a": np.array([2688.0], np.float32),
        "b": np.array(2688.0, np.float64),
        "c": np.array(2688, np.float16),
        "d": np.array([[2688]], ml_dtypes.bfloat16),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "amax.safetensors")
    assert load_input_scales(tmp_path / "amax.json").scale(["a"]) == 1
    scales = load_input_scales(str(tmp_path / "amax.safetensors"))
    assert [scales.scale([name]) for name in "abcd"] == [1, 1, 1, 1]


@pytest.mark.parametrize("value", [0, -1, "nan", "inf", "-1e-3", 1e39, 1e-45])
def test_useless_numbers_are_refused(value):
    with pytest.raises(InputScaleError, match="expected a number from"):
        load_input_scales(value)


@pytest.mark.parametrize("value", [0, "x", None, True, [1], float("nan"), 10**400])
def test_useless_amax_values_are_refused_with_their_name(value):
    scales = load_input_scales({"proj": value, "other": 1.0})
    scales.require(["other"])  # a useless value of a projection that is not cast does no harm
    with pytest.raises(InputScaleError, match="proj: expected a number from"):
        scales.require(["proj", "other"])


def test_numpy_numbers_are_numbers():
    scales = load_input_scales({"proj": np.float32(2688)})
    scales.require(["proj"])
    assert scales.scale(["proj"]) == 1


def test_a_reciprocal_that_no_fp32_number_holds_is_refused():
    with pytest.raises(InputScaleError, match=r"to 8\.51e\+37"):
        load_input_scales("3e38")


def test_a_tensor_that_is_no_number_is_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(InputScaleError, match="expected one floating-point number"):
        load_input_scales(tmp_path / "x.safetensors")


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(InputScaleError, match=r"a \.json or a \.safetensors"):
        load_input_scales(tmp_path / "amax.pt")


def test_w4a4_without_scales_is_refused_with_both_ways_out(miniatures, tmp_path):
    with pytest.raises(UsageError, match=r"--input-scales FILE .* --input-scales NUMBER"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", activations="w4a4")
    assert not list(tmp_path.iterdir())


def test_w4a4_with_a_missing_projection_is_refused_by_name(miniatures, tmp_path):
    with pytest.raises(InputScaleError, match=r"no amax for 24 of 24 projections, the first is 'model\.layers\.0"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", activations="w4a4", input_scales={"x": 1.0})
    assert not list(tmp_path.iterdir())


def test_scales_without_w4a4_are_refused(miniatures, tmp_path):
    with pytest.raises(UsageError, match="belongs to --activations w4a4"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", input_scales=1.0)
