"""Families by names and dtypes; partners and domains across shards; refusals that say what it is."""

import json
import shutil

import numpy as np
import pytest

from fp4cast import miniatures as mini
from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.conversion.domains import group_domains
from fp4cast.errors import PartnerError, ShapeError, UnsupportedError
from fp4cast.families.merging import shared_scale_group
from fp4cast.families.recognise import read_source
from fp4cast.formats import mxfp4_values

FAMILY = {
    "gpt-oss": ("gpt-oss", 4),
    "deepseek-v4": ("deepseek-v4", 30),
    "deepseek-v4.1": ("deepseek-v4", 30),
    "kimi-k3": ("kimi-k3", 24),
    "moe": ("compressed-tensors", 24),
    "dense": ("compressed-tensors", 14),
    "dense-0.13": ("compressed-tensors", 14),
}


@pytest.mark.parametrize("kind", mini.KINDS)
def test_families_are_recognised(miniatures, kind):
    source = read_source(open_checkpoint(miniatures[kind]))
    assert (source.family.name, len(source.pairs)) == FAMILY[kind]


def small(tmp_path, tensors, config=None):
    """A one-shard checkpoint of zeros: name -> (dtype, shape)."""
    sizes = {"U8": np.uint8, "I8": np.int8, "BF16": np.uint16, "F32": np.float32, "U32": np.uint32}
    arrays = {n: (d, np.zeros(shape, sizes.get(d, np.uint8))) for n, (d, shape) in tensors.items()}
    mini.write_checkpoint(tmp_path / "src", {"model-00001-of-00001.safetensors": arrays}, config or {})
    return open_checkpoint(tmp_path / "src")


def test_fp8_neighbours_with_the_same_suffix_pass_through(miniatures):
    pairs = read_source(open_checkpoint(miniatures["deepseek-v4"])).pairs
    assert not [name for name in pairs if "shared_experts" in name or "attn" in name]


def test_one_byte_tables_are_no_codes(miniatures):
    source = read_source(open_checkpoint(miniatures["deepseek-v4.1"]))
    assert "layers.1.engram.table.weight" in source.checkpoint.tensors
    assert "layers.1.engram.table" not in source.pairs


def test_partners_and_domains_are_found_across_shards(miniatures):
    source = read_source(open_checkpoint(miniatures["deepseek-v4"]))
    away = source.pairs["layers.0.ffn.experts.3.w1"]
    assert away.codes.path != away.scales.path
    w1, w3 = (source.pairs[f"layers.0.ffn.experts.2.{leaf}"] for leaf in ("w1", "w3"))
    assert w1.codes.path != w3.codes.path
    domains = dict(group_domains(list(source.pairs.values())))
    assert domains["layers.0.ffn.experts.2.w1+w3"] == (w1, w3)


@pytest.mark.parametrize(
    ("module", "domain"),
    [
        ("a.experts.0.w3", "a.experts.0.w1+w3"),
        ("a.experts.0.w2", "a.experts.0.w2"),
        ("a.mlp.up_proj", "a.mlp.gate_proj+up_proj"),
        ("a.self_attn.v_proj", "a.self_attn.q_proj+k_proj+v_proj"),
        ("a.mlp.experts.gate_up_proj", "a.mlp.experts.gate_up_proj"),
        ("w1", "w1+w3"),
    ],
)
def test_merged_projections_share_a_domain(module, domain):
    assert shared_scale_group(module)[0] == domain


def test_a_lone_member_of_a_group_is_a_domain_of_its_own(tmp_path):
    tensors = {"l.q_proj.weight_packed": ("U8", (4, 16)), "l.q_proj.weight_scale": ("U8", (4, 1))}
    source = read_source(small(tmp_path, tensors))
    assert [name for name, _ in group_domains(list(source.pairs.values()))] == ["l.q_proj"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"l.gate_up_proj_blocks": ("U8", (2, 4, 3, 16))},
            r"l\.gate_up_proj_blocks .* expected 'l\.gate_up_proj_scales'",
        ),
        ({"l.ffn.experts.0.w1.weight": ("I8", (4, 16))}, r"has no scales: expected 'l\.ffn\.experts\.0\.w1\.scale'"),
        ({"l.up_proj.weight_packed": ("U8", (4, 16))}, r"has no scales: expected 'l\.up_proj\.weight_scale'"),
        (
            {
                "a.weight_packed": ("U8", (4, 16)),
                "a.weight_scale": ("U8", (4, 1)),
                "b.weight_scale": ("U8", (4, 1)),
            },
            r"b\.weight_scale .* has no codes: expected 'b\.weight_packed'",
        ),
    ],
)
def test_a_missing_partner_is_an_error_with_its_name(tmp_path, tensors, message):
    with pytest.raises(PartnerError, match=message):
        read_source(small(tmp_path, tensors))


def gpt_oss(blocks, scales, dtype="U8"):
    return {"l.x_blocks": (dtype, blocks), "l.x_scales": ("U8", scales)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (gpt_oss((2, 4, 3, 8), (2, 4, 3)), "expected 16 bytes a block, got 8"),
        (gpt_oss((2, 4, 3, 16), (2, 4, 2)), r"expected shape \[2, 4, 3\]"),
        (gpt_oss((2, 4, 3, 16), (2, 5, 3)), r"expected shape \[2, 4, 3\]"),
        (gpt_oss((4, 3, 16), (4, 3)), r"expected codes of shape \[E, N, K/32, 16\]"),
        (gpt_oss((2, 0, 3, 16), (2, 0, 3)), "is empty"),
        ({"a.weight_packed": ("U8", (4, 24)), "a.weight_scale": ("U8", (4, 1))}, r"one scale for each 32 codes"),
        ({"a.weight_packed": ("U8", (2, 4, 16)), "a.weight_scale": ("U8", (2, 4, 1))}, r"shape \[N, K/2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_errors_with_both_sides(tmp_path, tensors, message):
    with pytest.raises(ShapeError, match=message):
        read_source(small(tmp_path, tensors))


NVFP4 = {"a.weight_scale": ("F8_E4M3", (4, 2))}
REFUSED = {
    "BF16": ({"a.weight": ("BF16", (4, 32))}, {}, "the checkpoint is BF16"),
    "FP8": (
        {"a.weight": ("F8_E4M3", (4, 32)), "a.scale": ("F8_E8M0", (1, 1))},
        {"quantization_config": {"quant_method": "fp8"}},
        r"the checkpoint is F8_E4M3 \(quant_method 'fp8'\)",
    ),
    "ModelOpt NVFP4": ({"a.weight": ("U8", (4, 16)), **NVFP4}, {}, r"already NVFP4 \(ModelOpt\)"),
    "fused NVFP4": (
        {"x.up_proj": ("U8", (2, 16, 4)), "x.up_proj_weight_scale": ("F8_E4M3", (2, 2, 4))},
        {},
        r"already NVFP4 \(ModelOpt, banks",
    ),
    "compressed NVFP4": ({"a.weight_packed": ("U8", (4, 16)), **NVFP4}, {}, r"already NVFP4 \(compressed-tensors\)"),
    "MLX": ({"a.weight": ("U32", (4, 4)), "a.scales": ("U8", (4, 1))}, {}, "MLX mxfp4"),
    "Quark": ({"a.weight": ("U8", (4, 16)), "a.weight_scale": ("U8", (4, 1))}, {}, "MiMo, Quark or ModelOpt"),
    "Ling": (
        {"a.experts.0.w.weight": ("I8", (4, 16)), "a.experts.0.w.weight_scale_inv": ("F8_E8M0", (4, 1))},
        {},
        "Ling-3.0",
    ),
    "Quark legacy": (
        {"a.weight": ("U8", (4, 20))},
        {"quantization_config": {"quant_method": "quark"}},
        "Quark checkpoint in its legacy",
    ),
    "original": ({"block.0.mlp.mlp1_weight.blocks": ("U8", (2, 4, 3, 16))}, {}, "original/ layout"),
    "nothing": ({"a.weight": ("BF16", (0,))}, {}, "no MXFP4 weights"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_checkpoints_are_refused_by_name(tmp_path, what):
    tensors, config, message = REFUSED[what]
    with pytest.raises(UnsupportedError, match=message):
        read_source(small(tmp_path, tensors, config))


def test_compressed_tensors_0_13_has_a_bias_of_125(miniatures):
    """The two twins hold the same values although their bytes differ by two."""
    values = {}
    for kind in ("dense", "dense-0.13"):
        pair = read_source(open_checkpoint(miniatures[kind])).pairs["model.layers.0.mlp.down_proj"]
        with File(pair.codes.path) as codes, File(pair.scales.path) as scales:
            raw = codes.read(pair.codes.start, pair.codes.nbytes).reshape(pair.codes.shape)
            b = scales.read(pair.scales.start, pair.scales.nbytes).reshape(pair.scales.shape)
        values[kind] = b, mxfp4_values(raw, b, pair.bias)
    assert not np.array_equal(values["dense"][0], values["dense-0.13"][0])
    np.testing.assert_array_equal(values["dense"][1], values["dense-0.13"][1])


@pytest.mark.parametrize(
    ("version", "bias"),
    [
        ("0.13.0", 125),
        ("0.13.1.a2", 125),
        ("0.13", 125),
        ("0.14.0", 127),
        ("0.130.0", 127),
        ("1.0.13.0", 127),
        (None, 127),
    ],
)
def test_only_version_0_13_has_the_trap(miniatures, tmp_path, version, bias):
    source = shutil.copytree(miniatures["dense"], tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["version"] = version
    (source / "config.json").write_text(json.dumps(config))
    assert {pair.bias for pair in read_source(open_checkpoint(source)).pairs.values()} == {bias}


def test_the_quantization_config_is_found_one_level_down():
    assert find_quantization_config({"text_config": {"quantization_config": {"a": 1}}}) == (
        ("text_config", "quantization_config"),
        {"a": 1},
    )
    assert find_quantization_config({"quantization_config": None, "x": 3}) == ((), {})
