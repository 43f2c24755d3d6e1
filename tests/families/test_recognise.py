"""Families by names and dtypes; partners and domains across shards; refusals that say what it is."""

import json
import shutil

import numpy as np
import pytest

import fp4cast
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
    "gpt-oss-original": ("gpt-oss", 4),
    "gpt-oss-experts": ("gpt-oss-experts", 24),
    "deepseek-v4": ("deepseek-v4", 30),
    "deepseek-v4.1": ("deepseek-v4", 30),
    "kimi-k3": ("kimi-k3", 24),
    "moe": ("compressed-tensors", 24),
    "dense": ("compressed-tensors", 14),
    "dense-0.13": ("compressed-tensors", 14),
    "quark": ("quark", 14),
    "modelopt-mxfp4": ("modelopt-mxfp4", 24),
    "mimo-v2.6": ("mimo-v2.6", 24),
    "ling-3": ("ling-3", 24),
    "mlx-mxfp4": ("mlx-mxfp4", 24),
}


@pytest.mark.parametrize("kind", mini.KINDS)
def test_families_are_recognised(miniatures, kind):
    source = read_source(open_checkpoint(miniatures[kind]))
    assert (source.family.name, len(source.pairs)) == FAMILY[kind]


def test_inspect_says_that_mlx_has_a_layout_of_its_own(miniatures):
    assert ["--layout mlx" in note for note in fp4cast.inspect(miniatures["mlx-mxfp4"]).notes] == [True]
    assert not fp4cast.inspect(miniatures["dense"]).notes


def test_scales_without_a_shape_are_none_of_mlx(tmp_path):
    path = tmp_path / "src"
    arrays = {"a.weight": ("U32", np.zeros((), np.uint32)), "a.scales": ("U8", np.zeros((), np.uint8))}
    mini.write_checkpoint(path, {"model-00001-of-00001.safetensors": arrays}, {})
    with pytest.raises(UnsupportedError):
        read_source(open_checkpoint(path))


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


def quark(dtype, where="global_quant_config"):
    spec = {"weight": {"dtype": dtype, "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}}
    return {"quant_method": "quark", where: spec if where == "global_quant_config" else {"*mlp*": spec}}


PLAIN = {"a.weight": ("U8", (4, 16)), "a.weight_scale": ("U8", (4, 1))}
MLX = {"a.weight": ("U32", (4, 4)), "a.scales": ("U8", (4, 1))}
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
    "MLX nvfp4": ({"a.weight": ("U32", (4, 4)), "a.scales": ("U8", (4, 2))}, {}, "MLX's, .* not mxfp4"),
    "MLX mxfp8": ({"a.weight": ("U32", (4, 8)), "a.scales": ("U8", (4, 1))}, {}, "MLX's, .* not mxfp4"),
    "MLX of another model": (MLX, {"model_type": "gpt_oss"}, "MLX mxfp4 of a model of type 'gpt_oss'"),
    "MLX embeddings": (
        {f"model.embed_tokens.{leaf}": MLX[f"a.{leaf}"] for leaf in ("weight", "scales")},
        {"model_type": "llama"},
        "its embeddings are MXFP4",
    ),
    "nobody's": (PLAIN, {}, "named like MXFP4 of AMD Quark, ModelOpt and MiMo. Its config.json names none"),
    "Quark FP8 by its config": (PLAIN, {"quantization_config": quark("fp8_e4m3")}, "names none of them"),
    "Ling": (
        {"a.experts.0.w.weight": ("I8", (4, 16)), "a.experts.0.w.weight_scale_inv": ("F8_E8M0", (4, 1))},
        {},
        r"named like MXFP4 of Ling-3\.0\. Its config\.json does not say so",
    ),
    "Quark legacy": (
        {"a.weight": ("U8", (4, 20))},
        {"quantization_config": quark("mx")},
        "Quark checkpoint in its legacy",
    ),
    "Quark FP8": (
        {"a.weight": ("F8_E4M3", (4, 20))},
        {"quantization_config": quark("fp8_e4m3")},
        r"the checkpoint is F8_E4M3 \(quant_method 'quark'\)",
    ),
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


@pytest.mark.parametrize("where", ["global_quant_config", "layer_quant_config", "layer_type_quant_config"])
def test_quark_says_in_three_places_that_it_is_mxfp4(tmp_path, where):
    source = read_source(small(tmp_path, PLAIN, {"quantization_config": quark("fp4", where)}))
    assert (source.family.name, list(source.pairs)) == ("quark", ["a"])


@pytest.mark.parametrize("algorithm", ["mxfp4", "MXFP4", "W4A8_MXFP4_FP8"])
@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_modelopt_names_its_mxfp4_in_one_of_two_files(tmp_path, algorithm, layers, where):
    said = {"quantized_layers": {"a": {"quant_algo": algorithm}}} if layers else {"quant_algo": algorithm}
    checkpoint = small(tmp_path, PLAIN, {"quantization_config": said} if where == "config.json" else {})
    if where != "config.json":
        (checkpoint.path / where).write_text(json.dumps({"quantization": said}))
    assert read_source(checkpoint).family.name == "modelopt-mxfp4"


def test_config_json_prevails_over_hf_quant_config(tmp_path):
    checkpoint = small(tmp_path, PLAIN, {"quantization_config": {"quant_algo": "FP8"}})
    (checkpoint.path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "mxfp4"}}))
    with pytest.raises(UnsupportedError, match="names none of them"):
        read_source(checkpoint)


QUARK = {"quantization_config": quark("fp4")}


def test_mxfp6_is_named_by_its_size(tmp_path):
    with pytest.raises(ShapeError, match=r"a\.weight_scale .*24 bytes a block are MXFP6"):
        read_source(small(tmp_path, {"a.weight": ("U8", (4, 48)), "a.weight_scale": ("U8", (4, 2))}, QUARK))


@pytest.mark.parametrize("name", ["a.input_scale", "l.k_proj.output_scale"])
def test_scales_of_fp8_activations_are_refused(tmp_path, name):
    with pytest.raises(UnsupportedError, match=rf"{name} .* scales FP8 activations beside MXFP4 weights"):
        read_source(small(tmp_path, {**PLAIN, name: ("F32", ())}, QUARK))


@pytest.mark.parametrize("suffix", [".weight", ".weight_packed"])
def test_nvfp4_beside_mxfp4_is_called_that(tmp_path, suffix):
    tensors = {f"a{suffix}": ("U8", (4, 16)), "a.weight_scale": ("U8", (4, 1)), f"b{suffix}": ("U8", (4, 16))}
    source = small(tmp_path, {**tensors, "b.weight_scale": ("F8_E4M3", (4, 2))}, QUARK)
    with pytest.raises(UnsupportedError, match=rf"b{suffix} .* is NVFP4 already, .* beside weights in MXFP4"):
        read_source(source)


LING = {"a.mlp.experts.0.w.weight": ("I8", (4, 16)), "a.mlp.experts.0.w.weight_scale_inv": ("F8_E8M0", (4, 1))}
EXPERT = {"a.mlp.experts.0.w.weight": ("U8", (4, 16)), "a.mlp.experts.0.w.weight_scale": ("F8_E8M0", (4, 1))}


@pytest.mark.parametrize(("tensors", "family"), [(EXPERT, "mimo-v2.6"), (LING, "ling-3")])
@pytest.mark.parametrize("key", ["store_dtype", "routed_experts_quant_method"])
def test_mxfp4_experts_beside_fp8_are_described_in_one_of_two_ways(tmp_path, tensors, family, key):
    config = {"quantization_config": {"quant_method": "fp8", key: "mxfp4"}}
    assert read_source(small(tmp_path, tensors, config)).family.name == family


@pytest.mark.parametrize("kind", ["mimo-v2.6", "ling-3"])
def test_fp8_neighbours_of_mxfp4_experts_pass_through(miniatures, converted, kind):
    """And no word of MXFP4 is left in the config, or engines would read NVFP4 as that."""
    source = read_source(open_checkpoint(miniatures[kind]))
    fp8 = {name for name, tensor in source.checkpoint.tensors.items() if tensor.dtype == "F8_E4M3"}
    assert fp8
    assert not any(name.removesuffix(".weight") in source.pairs for name in fp8)
    pair = source.pairs["model.layers.1.mlp.experts.3.gate_proj"]
    assert pair.codes.path != pair.scales.path
    config = json.loads((converted[kind] / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["moe_quant_algo"]) == ("fp8", "NVFP4")
    assert "mxfp4" not in json.dumps(config)
    assert not [key for key in config if key.startswith(("store_dtype", "routed_experts"))]


def test_quark_s_gpt_oss_is_not_taken_for_a_model_that_engines_load(tmp_path):
    name = "model.layers.0.mlp.experts.0.gate_up_proj"
    tensors = {
        f"{name}.weight": ("U8", (4, 16)),
        f"{name}.weight_scale": ("U8", (4, 1)),
        f"{name}.bias": ("BF16", (4,)),
    }
    source = read_source(small(tmp_path, tensors, {**QUARK, "model_type": "gpt_oss"}))
    assert source.family.name == "gpt-oss-quark"
    assert source.family.served("modelopt", "w4a16").startswith("no engine that we ran or read; not vLLM")


@pytest.mark.parametrize("shape", [(), (0, 4), (10**9, 0), (5000, 4)])
def test_a_tensor_of_all_experts_has_some_and_not_too_many(tmp_path, shape):
    stacked = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{stacked}.weight": ("U32", (2, 4, 4)), f"{stacked}.scales": ("U8", (2, 4, 1))}
    with pytest.raises(ShapeError, match=r"switch_mlp\.up_proj\.bias .*each of 1 to 4096 experts"):
        read_source(small(tmp_path, {**tensors, f"{stacked}.bias": ("BF16", shape)}, {"model_type": "llama"}))


def test_two_tensors_that_would_have_one_name_are_refused(tmp_path):
    stacked = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{stacked}.weight": ("U32", (2, 4, 4)), f"{stacked}.scales": ("U8", (2, 4, 1))}
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"] = ("BF16", (4, 32))
    with pytest.raises(UnsupportedError, match=r"'model\.layers\.0\.mlp\.experts\.1\.up_proj\.weight', but so would"):
        read_source(small(tmp_path, tensors, {"model_type": "llama"}))
