"""A source's config that no conversion can keep is refused before anything is written; what can be kept is."""

import json
import shutil

import pytest

import fp4cast
from fp4cast.errors import CheckpointError
from helpers import VARIANTS

IDS = ["-".join(variant) for variant in VARIANTS]


def convert(source, destination, layout, activations):
    scales = 1.0 if activations == "w4a4" else None
    return fp4cast.convert(source, destination, layout=layout, activations=activations, input_scales=scales)


def changed(source, tmp_path, change):
    copy = shutil.copytree(source, tmp_path / "src")
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def refused(source, tmp_path, variant, message):
    """Nothing is written: neither a destination nor a working directory."""
    with pytest.raises(CheckpointError, match=message) as error:
        convert(source, tmp_path / "dst", *variant)
    assert str(source / "config.json") in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


WRONG = {"a list": [], "text": "x", "a number": 5, "true": True}
KEYS = ("quantization_config", "compression_config")


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("value", WRONG)
def test_a_quantization_config_that_is_no_object_is_refused(miniatures, tmp_path, variant, value):
    source = changed(miniatures[variant[0]], tmp_path, lambda d: d.update(quantization_config=WRONG[value]))
    refused(source, tmp_path, variant[1:], r"quantization_config is '.*', expected an object")


@pytest.mark.parametrize("kind", ["kimi-k3", "gpt-oss"])
@pytest.mark.parametrize("key", KEYS)
def test_nor_one_a_level_down(miniatures, tmp_path, kind, key):
    variant = next(variant[1:] for variant in VARIANTS if variant[0] == kind)
    source = changed(miniatures[kind], tmp_path, lambda d: d.setdefault("vision_config", {}).update({key: 7}))
    refused(source, tmp_path, variant, rf"vision_config\.{key} is '7', expected an object")


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantization_config_is_as_good_as_none(miniatures, tmp_path, variant, value):
    """Beside a real one (Kimi-K3's, or another key), or alone. transformers reads null as absent."""

    def change(config):
        if "quantization_config" in config:
            config["compression_config"] = value
        else:
            config["quantization_config"] = value

    report = convert(changed(miniatures[variant[0]], tmp_path, change), tmp_path / "dst", *variant[1:])
    assert report.exact and report.verified
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert "compression_config" not in config
    assert config.get("quantization_config", ...) not in (None, {}), "no empty one shadows the real one"


@pytest.mark.parametrize("value", [None, {}])
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_an_empty_one_alone_is_replaced(miniatures, tmp_path, value, layout):
    source = changed(miniatures["dense"], tmp_path, lambda d: d.update(quantization_config=value))
    assert convert(source, tmp_path / "dst", layout, "w4a16").exact
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]["quant_method"]


def test_an_empty_one_does_not_hide_the_version_that_the_bias_depends_on(miniatures, tmp_path):
    def move(config):
        config["text_config"] = {"quantization_config": config.pop("quantization_config")}
        config["quantization_config"] = None

    source = changed(miniatures["dense-0.13"], tmp_path, move)
    assert convert(source, tmp_path / "dst", "compressed-tensors", "w4a16").exact


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_a_quantization_config_two_levels_down_is_refused(miniatures, tmp_path, variant):
    deep = {"b": {"quantization_config": {"quant_method": "fp8"}}}
    source = changed(miniatures[variant[0]], tmp_path, lambda d: d.update(a=deep))
    refused(source, tmp_path, variant[1:], r"a\.b\.quantization_config is too deep, expected a quantization_config at")


def groups(config):
    section = config.get("quantization_config") or config["text_config"]["quantization_config"]
    return section["config_groups"]


COMPRESSED = [variant for variant in VARIANTS if variant[1] == "compressed-tensors"]
OTHER = {"num_bits": 8, "type": "int", "group_size": 128}


@pytest.mark.parametrize("variant", COMPRESSED, ids=["-".join(variant) for variant in COMPRESSED])
@pytest.mark.parametrize("key", OTHER)
def test_groups_that_are_not_mxfp4_are_refused(miniatures, tmp_path, variant, key):
    source = changed(
        miniatures[variant[0]], tmp_path, lambda d: groups(d)["group_0"]["weights"].update({key: OTHER[key]})
    )
    refused(source, tmp_path, variant[1:], r"describes compressed-tensors w4a16, expected|has no group of MXFP4")


@pytest.mark.parametrize("variant", COMPRESSED, ids=["-".join(variant) for variant in COMPRESSED])
def test_another_group_beside_that_of_mxfp4_is_kept(miniatures, tmp_path, variant):
    fp8 = {"targets": ["re:.*none"], "weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8}}
    source = changed(miniatures[variant[0]], tmp_path, lambda d: groups(d).update(group_1=fp8))
    assert convert(source, tmp_path / "dst", *variant[1:]).exact
    assert groups(json.loads((tmp_path / "dst" / "config.json").read_text()))["group_1"] == fp8
