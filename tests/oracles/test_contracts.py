"""Miniatures keep the rules of engines' loaders, each read there, with the lines; each rule is seen to fail."""

import copy
import fnmatch
import re

import pytest
from contracts import (
    Rule,
    Written,
    banks,
    exclusions,
    has,
    merged_alike,
    projections,
    says,
    sglang_algorithm,
    sglang_excludes,
    trt_excludes,
    trt_excludes_since_2026,
)

import fp4cast
from helpers import VARIANTS

MODELOPT = (".weight", ".weight_scale", ".weight_scale_2", ".input_scale")
PACKED = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")
ALGORITHMS = {"w4a4": "NVFP4", "w4a16": "W4A16_NVFP4"}
BANK = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj|w[123])")


def w4a4(written):
    return any(name.endswith(("input_scale", "input_global_scale")) for name in written.tensors)


def algorithm(written):
    return ALGORITHMS["w4a4" if w4a4(written) else "w4a16"]


def gpt_oss_banks(written):
    for bank, experts, rows, inner in banks(written):
        yield from has(written, bank, "U8", (experts, inner // 2, rows))
        yield from has(written, f"{bank}_weight_scale", "F8_E4M3", (experts, inner // 16, rows))
        yield from has(written, f"{bank}_bias", "BF16", (experts, rows))


def gpt_oss_scalars(written):
    for bank, *_ in banks(written):
        yield from has(written, f"{bank}_weight_scale_2", "F32", None)
        yield from has(written, f"{bank}_input_scale", "F32", None)


def gpt_oss_attention(written):
    for i in range(written.config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        names = [f"self_attn.{x}_proj.{end}" for x in "qkvo" for end in ("weight", "bias")]
        for name in [*names, "self_attn.sinks", "mlp.router.weight", "mlp.router.bias"]:
            found = written.tensors.get(f"{at}.{name}", ("", ()))
            if found[0] not in ("BF16", "F32"):
                yield f"{at}.{name} is {found}, expected a plain tensor"


def gpt_oss_config(written):
    section = written.beside["quantization"]
    yield from says(section, quant_algo="NVFP4", group_size=16)
    if not section["exclude_modules"]:
        yield "no exceptions: attention would be built as NVFP4"


def twins(written):
    section = written.beside["quantization"]
    yield from says(section, quant_algo=algorithm(written), group_size=16)
    yield from says(
        written.section,
        quant_method="modelopt",
        quant_algo=section["quant_algo"],
        group_size=section["group_size"],
        ignore=section["exclude_modules"],
    )


def trt_exclusions(written):
    for excludes in (trt_excludes, trt_excludes_since_2026):
        yield from exclusions(written, excludes, written.beside["quantization"]["exclude_modules"])


def sglang_flat(written):
    yield from says(written.section, quant_method="modelopt", quant_algo=algorithm(written), group_size=16)
    yield from exclusions(written, sglang_excludes, written.section["ignore"])


def sglang_mixed(written):
    """K3's blocks are called mlp in SGLang, which renames the keys of the table alike."""
    section = written.section
    yield from says(section, quant_method="modelopt_mixed", quant_algo="MIXED_PRECISION")
    layers = {key.replace("block_sparse_moe", "mlp"): value for key, value in section["quantized_layers"].items()}
    for module in {BANK.fullmatch(module)[1] for module in written.cast}:
        found = sglang_algorithm(module.replace("block_sparse_moe", "mlp"), layers)
        if found != algorithm(written):
            yield f"{module} would be read as {found}"
    for module in written.linear:
        if sglang_algorithm(module, layers) is not None:
            yield f"{module} would be read as NVFP4"


def experts(names):
    def faults(written):
        yield from projections(written, names, w4a4(written))
        yield from (f"{module} is no expert" for module in written.cast if not BANK.fullmatch(module))

    return faults


def sglang_hybrid(written):
    section = written.section
    yield from says(section, quant_method="fp8", quant_algo="MIXED_PRECISION", moe_quant_algo="NVFP4", group_size=16)
    ignore = [entry.replace(".ffn.", ".mlp.") for entry in section["ignore"]]  # srt/models/deepseek_v4.py:4623
    for module in written.cast:
        if sglang_excludes("model." + BANK.fullmatch(module)[1].replace(".ffn.", ".mlp."), ignore):
            yield f"{module} would not be NVFP4"


def vllm_hybrid(written):
    yield from says(written.section, moe_quant_algo="NVFP4")
    stays = {name.rpartition(".experts.")[0] for name in written.tensors if re.match(r"mtp\..*\.experts\.", name)}
    for at, wanted in [(BANK.fullmatch(m)[1], False) for m in written.cast] + [(f"{m}.experts", True) for m in stays]:
        if any(fnmatch.fnmatchcase(at, entry) for entry in written.section["ignore"]) != wanted:
            yield f"{at} would{' ' if wanted else ' not '}be read as NVFP4"


def packed_args(written):
    group = next(iter(written.section["config_groups"].values()))
    spec = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    yield from says(written.section, quant_method="compressed-tensors", format="nvfp4-pack-quantized")
    yield from says(group["weights"], **spec)
    if w4a4(written):
        yield from says(group["input_activations"], **spec)
    elif group["input_activations"] is not None:
        yield "input_activations is not null"


def drop(ending):
    return lambda written: written.tensors.pop(next(name for name in written.tensors if name.endswith(ending)))


def drop_codes(written):
    del written.tensors[f"{written.cast[0]}.weight"]


def another(ending, tensor):
    def spoil(written):
        written.tensors[next(name for name in written.tensors if name.endswith(ending))] = tensor

    return spoil


def unlike(ending):
    return lambda written: written.scalars.update({next(n for n in written.scalars if n.endswith(ending)): 3.0})


def unlike_gate(written):
    written.scalars.update({next(n for n in written.scalars if re.search(r"(gate_proj|w1).weight_scale_2$", n)): 3.0})


def unlist(written):
    layers = written.section["quantized_layers"]
    layers.pop(next(iter(layers)))
    for key in [key for key in layers if ".layers.1." in key]:
        del layers[key]


TRT, MOE = "TensorRT-LLM", "_torch/modules/fused_moe/quantization.py"
GPT_OSS = "_torch/models/modeling_gpt_oss.py"
LINEAR = "_torch/modules/linear.py: NVFP4LinearMethod"
QUANT = "srt/layers/quantization/modelopt_quant.py"
CT = "srt/layers/quantization/compressed_tensors"
RULES = [
    Rule(TRT, ("gpt-oss/modelopt/w4a4",), f"{GPT_OSS}: load_nvfp4_weights",
         gpt_oss_banks, drop("down_proj_weight_scale")),
    Rule(TRT, ("gpt-oss/modelopt/w4a4",),
         f"{MOE}: NVFP4FusedMoEMethod.load_quant_scales, load_expert_fc31_alpha_nvfp4",
         gpt_oss_scalars, another("gate_up_proj_weight_scale_2", ("F32", (4,)))),
    Rule(TRT, ("gpt-oss/modelopt/w4a4",), f"{MOE}: NVFP4FusedMoEMethod.load_quant_scales (KeyError)",
         gpt_oss_scalars, drop("down_proj_input_scale")),
    Rule(TRT, ("gpt-oss/modelopt/w4a4",), f"{GPT_OSS}: load_nvfp4_weights, __post_init__",
         gpt_oss_attention, another("q_proj.weight", ("U8", (64, 32)))),
    Rule(TRT, ("gpt-oss/modelopt/w4a4",), f"{GPT_OSS}: GptOssForCausalLM.__post_init__",
         gpt_oss_config, lambda written: written.beside["quantization"].update(exclude_modules=[])),
    Rule(TRT, ("dense/modelopt/w4a4",), f"{LINEAR}.create_weights, load_weight_scales",
         lambda written: projections(written, MODELOPT, w4a4=True), drop(".o_proj.input_scale")),
    Rule(TRT, ("dense/modelopt/w4a4",), f"{LINEAR}.load_weight_scales (asserts)",
         lambda written: merged_alike(written, ".weight_scale_2", ".input_scale"), unlike(".up_proj.input_scale")),
    Rule(TRT, ("dense/modelopt/*",), "models/modeling_utils.py: QuantConfig.is_module_excluded_from_quantization",
         trt_exclusions, lambda written: written.beside["quantization"].update(exclude_modules=["lm_hea"])),
    Rule(TRT, ("dense/modelopt/*",), "quantization/modelopt_config.py at 2edf354: parse_modelopt_quant_config",
         twins, lambda written: written.beside["quantization"].update(group_size=32)),
    Rule("SGLang", ("dense/modelopt/*",), f"{QUANT}:309-313,379-424,1595-1702; srt/configs/model_config.py:1733-1740",
         sglang_flat, lambda written: written.section["ignore"].append("*_proj")),
    Rule("SGLang", ("dense/modelopt/*",), f"{QUANT}:1796-1885,2197-2268",
         lambda written: projections(written, MODELOPT, w4a4(written)), another("k_proj.weight", ("I8", (32, 32)))),
    Rule("SGLang", ("moe/modelopt/*", "kimi-k3/modelopt/*"), f"{QUANT}:829-835,885-892,978-1033,1080-1092",
         sglang_mixed, unlist),
    Rule("SGLang", ("moe/modelopt/*", "kimi-k3/modelopt/*"), f"{QUANT}:2494-2648; "
         "srt/layers/moe/fused_moe_triton/layer.py:1797-1822", experts(MODELOPT), drop_codes),
    Rule("SGLang", ("moe/modelopt/*", "kimi-k3/modelopt/*"), f"{QUANT}:2747-2756",
         lambda written: merged_alike(written, ".weight_scale_2"), unlike_gate),
    Rule("SGLang", ("deepseek-v4*/modelopt/w4a4",), "srt/configs/model_config.py:778-788; "
         f"srt/model_loader/loader.py:230-249; {QUANT}:1747-1763",
         sglang_hybrid, lambda written: written.section.pop("moe_quant_algo")),
    Rule("SGLang", ("deepseek-v4*/modelopt/w4a4",), f"{QUANT}:2494-2648", experts(MODELOPT), drop(".w2.input_scale")),
    Rule("SGLang", ("dense/compressed-tensors/*", "moe/compressed-tensors/*"), f"{CT}/compressed_tensors.py:589-629",
         packed_args, lambda written: written.section["config_groups"]["group_0"]["weights"].update(group_size=32)),
    Rule("SGLang", ("dense/compressed-tensors/*", "moe/compressed-tensors/*"),
         f"{CT}/schemes/compressed_tensors_w4a16_nvfp4.py:155-192; {CT}/schemes/compressed_tensors_w4a4_nvfp4.py:55-92",
         lambda written: projections(written, PACKED, w4a4(written)), drop(".weight_packed")),
    Rule("SGLang", ("dense/compressed-tensors/*", "moe/compressed-tensors/*"),
         f"{CT}/schemes/compressed_tensors_w4a16_nvfp4.py:204-212; "
         f"{CT}/schemes/compressed_tensors_w4a4_nvfp4_moe.py:188-196",
         lambda written: merged_alike(written, ".weight_global_scale"), unlike(".gate_proj.weight_global_scale")),
    Rule("vLLM", ("deepseek-v4.1/modelopt/w4a4",), "models/deepseek_v41/quant_config.py:95-124",
         vllm_hybrid, lambda written: written.section.update(ignore=["*.ffn.experts"])),
]  # fmt: skip
CASES = [
    (rule, f"{kind}/{layout}/{activations}")
    for rule in RULES
    for kind, layout, activations in VARIANTS
    if any(fnmatch.fnmatchcase(f"{kind}/{layout}/{activations}", about) for about in rule.about)
]


@pytest.fixture(scope="module")
def written(miniatures, tmp_path_factory):
    """What a variant looks like to a loader, converted once."""
    made = {}

    def get(variant):
        if variant not in made:
            kind, layout, activations = variant.split("/")
            path = tmp_path_factory.mktemp("contracts") / "dst"
            scales = 0.25 if activations == "w4a4" else None
            fp4cast.convert(miniatures[kind], path, layout=layout, activations=activations, input_scales=scales)
            made[variant] = Written.read(path)
        return copy.deepcopy(made[variant])

    return get


@pytest.mark.parametrize(
    ("rule", "variant"), CASES, ids=lambda each: each if isinstance(each, str) else f"{each.engine} {each.where}"
)
def test_a_rule_holds_and_can_fail(written, rule, variant):
    found = written(variant)
    assert list(rule.faults(found)) == []
    rule.spoil(found)
    assert list(rule.faults(found)), "the rule sees nothing"


def test_every_rule_is_asked_of_something():
    assert {id(rule) for rule in RULES} == {id(rule) for rule, _ in CASES}


def gpt_oss_names(written):
    return [name for name in written("gpt-oss/modelopt/w4a4").tensors if ".experts." in name]


def test_vllm_has_no_name_for_the_scales_of_banks(written):
    """model_executor/models/gpt_oss.py:1376-1401 maps suffixes, and none of them is that of a scale."""
    suffixes = (".gate_up_proj", ".down_proj", ".gate_up_proj_bias", ".down_proj_bias", ".gate_up_proj_blocks",
                ".down_proj_scales", ".gate_up_proj.weight_scale", ".down_proj.input_scale")  # fmt: skip
    lost = {name.partition(".experts.")[2] for name in gpt_oss_names(written) if not name.endswith(suffixes)}
    assert lost == {
        f"{bank}_{end}"
        for bank in ("gate_up_proj", "down_proj")
        for end in ("weight_scale", "weight_scale_2", "input_scale")
    }


def test_sglang_finds_no_parameter_for_the_scales_of_banks(written):
    """srt/models/gpt_oss.py:1261-1283 replaces a part; srt/layers/moe/fused_moe_triton/layer.py:1832-1841."""
    mapping = [("w13_weight", "gate_up_proj"), ("w13_weight_bias", "gate_up_proj_bias"),
               ("w2_weight", "down_proj"), ("w2_weight_bias", "down_proj_bias")]  # fmt: skip
    ends = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    parameters = {f"{bank}_{end}" for bank in ("w13", "w2") for end in ends}  # QUANT:2494-2648: no biases
    reached = set()
    for name in {name.partition(".experts.")[2] for name in gpt_oss_names(written)}:
        reached |= {new for to, old in mapping if old in name if (new := name.replace(old, to)) in parameters}
    assert reached == {"w13_weight", "w2_weight"}


def test_tensorrt_llm_takes_attention_of_a_w4a16_gpt_oss_for_quantized(written):
    """GptOssForCausalLM.__post_init__: a list of its own for NVFP4 only, otherwise the checkpoint's."""
    own = ["block.*.attn.qkv", "block.*.attn.out", "block.*.mlp.gate", "embedding", "unembedding"]
    names = {"qkv": "qkv_proj", "out": "o_proj", "unembedding": "lm_head"}
    modules = ["model.block.0.attn.qkv_proj", "model.block.0.attn.o_proj", "model.block.0.mlp.gate"]

    def excluded(entries):
        parts = [entry.split(".") for entry in entries]
        parts = [[*part[:-1], names.get(part[-1], part[-1])] for part in parts]
        found = [".".join(part if part[0] == "model" else ["model", *part]) for part in parts]
        return [module for module in modules if trt_excludes_since_2026(module, found)]

    assert excluded(own) == modules
    assert excluded(written("gpt-oss/modelopt/w4a16").beside["quantization"]["exclude_modules"]) == []


def test_tensorrt_llm_asks_for_activations_in_the_compressed_tensors_layout(written):
    """models/quant_config_utils.py at 21156a7: _quant_config_from_config_group subscripts `input_activations`."""
    found = {kind: written(f"dense/compressed-tensors/{kind}").section["config_groups"] for kind in ("w4a16", "w4a4")}
    assert found["w4a16"]["group_0"]["input_activations"] is None
    assert found["w4a4"]["group_0"]["input_activations"]["strategy"] == "tensor_group"


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_transformers_drops_the_tensor_scale_of_compressed_experts(miniatures, tmp_path):
    """So this layout is not offered to it; when this fails, it has learned to read it: change the row in `served`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    import fp4cast.hf

    found = {}
    for layout in ("modelopt", "compressed-tensors"):
        fp4cast.convert(miniatures["moe"], tmp_path / layout, layout=layout)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / layout, dtype="bfloat16")
        found[layout] = dict(model.named_parameters())["model.layers.0.mlp.experts.gate_up_proj"].float()
    assert (found["compressed-tensors"] / found["modelopt"]).nanmedian() > 100
