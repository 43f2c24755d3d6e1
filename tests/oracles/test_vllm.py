"""vLLM's own loader builds the models and holds exactly the values of the files, fused projections included."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import attention
import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.families.recognise import read_source
from fp4cast.ptq.flow import Options, quantize
from helpers import edit
from models import TINY, pack

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("FP4CAST_VLLM")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: run ./dev vllm"),
]
VARIANTS = [
    (k, lo, a) for k in ("dense", "moe") for lo in ("modelopt", "compressed-tensors") for a in ("w4a16", "w4a4")
]


def engine(script, *arguments):
    """Run one of the scripts beside this file in vLLM's environment, with fp4cast from this checkout."""
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [PYTHON, Path(__file__).parent / f"{script}.py", *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip


def cast(source, destination, layout="modelopt", activations="w4a16"):
    """Convert; with W4A4, no two activation scales are alike and none is a power of two."""
    amax = {module: 1000.0 + 7 * i for i, module in enumerate(read_source(open_checkpoint(source)).pairs)}
    scales = amax if activations == "w4a4" else None
    fp4cast.convert(source, destination, layout=layout, activations=activations, input_scales=scales)
    return destination


def test_vllm_loads_every_variant_exactly_and_runs_the_dense_ones(miniatures, tmp_path):
    for kind, layout, activations in VARIANTS:
        cast(miniatures[kind], tmp_path / f"{kind}-{layout}-{activations}", layout, activations)
    done = engine("vllm_loader", "--generate", *sorted(tmp_path.iterdir()))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for kind, projections in (("dense", 14), ("moe", 24)):
        assert done.stdout.count(f"{projections} projections equal, 0 differ") == 4, (kind, done.stdout)
    assert done.stdout.count("generated [") == 4


@pytest.mark.filterwarnings("ignore")
def test_vllm_caches_in_fp8_with_the_scales_of_the_files(miniatures, tmp_path):
    """Constants, and calibrated ones in both layouts; gpt-oss with the plugin."""
    torch.manual_seed(0)
    (tmp_path / "llama").mkdir()
    config = transformers.LlamaConfig(**TINY, intermediate_size=96, num_hidden_layers=2)
    llama = pack(transformers.LlamaForCausalLM(config), tmp_path / "llama", ("embed", "lm_head", "self_attn"))
    gpt_oss = ROOT / "tests" / "fixtures" / "gpt-oss-tiny"
    outputs = [tmp_path / f"{each}" for each in range(6)]
    for path, kind, layout in zip(
        outputs, ("dense", "dense", "moe"), ("modelopt", *2 * ["compressed-tensors"]), strict=False
    ):
        fp4cast.convert(miniatures[kind], path, layout=layout, kv_cache_qformat="fp8_cast")
    text = {"dataset": str(gpt_oss / "calibration.txt"), "calib_size": 2, "calib_seq": 64}
    for path, source, layout in zip(
        outputs[3:], (llama, llama, gpt_oss), ("modelopt", "compressed-tensors", "modelopt"), strict=True
    ):
        options = Options(source, path, "nvfp4_mlp_weight_only", True, kv_cache_qformat="fp8", layout=layout, **text)
        quantize(options)
    done = engine("vllm_loader", "--plugin", *outputs)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines() if "scales of the KV cache" in line]
    counts = ((4, 0), (4, 4), (4, 4), (4, 4), (4, 4), (8, 8))
    assert lines == [f"{n} of {n} scales of the KV cache equal ({stored} stored)" for n, stored in counts]
    tensors = load_file(outputs[3] / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_proj.v_scale"]  # vLLM takes that of the keys
    save_file(tensors, outputs[3] / "model.safetensors", {"format": "pt"})
    done = engine("vllm_loader", "--plugin", "--only-load", outputs[3])
    assert "CheckpointError: model.layers.1.self_attn.attn.v_scale: nothing in the checkpoint filled it" in done.stdout


def test_the_check_itself_can_fail(miniatures, tmp_path):
    """A layer that the config forgets is seen: the loader's check is no rubber stamp."""
    fp4cast.convert(miniatures["moe"], tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    config["quantization_config"]["quantized_layers"].pop("model.layers.1.mlp.experts")
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    assert engine("vllm_loader", tmp_path / "moe").returncode == 1


def test_with_the_plugin_it_loads_gpt_oss_too_and_finds_nothing_missing(miniatures, tmp_path):
    """Padding included: 96 is no multiple of Marlin's tiles."""
    for kind, layout, activations in [*VARIANTS, ("gpt-oss", "modelopt", "w4a16"), ("gpt-oss", "modelopt", "w4a4")]:
        cast(miniatures[kind], tmp_path / f"{kind}-{layout}-{activations}", layout, activations)
    for layout in ("modelopt", "compressed-tensors"):
        cast(miniatures["dense-0.13"], tmp_path / f"dense-0.13-{layout}", layout)
    done = engine("vllm_loader", "--plugin", *sorted(tmp_path.iterdir()))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("4 projections equal, 0 differ") >= 2 and done.stdout.count(" 0 differ") == 12
    assert done.stdout.count("33 of 33 other tensors equal") == 2, done.stdout


LOST = [  # kind, layout, the tensor, and vLLM's name of its place
    ("gpt-oss", "modelopt", "layers.1.mlp.experts.gate_up_proj_bias", r"layers.1.*w13_bias"),
    ("gpt-oss", "modelopt", "layers.0.mlp.experts.down_proj_bias", r"layers.0.*w2_bias"),
    ("gpt-oss", "modelopt", "layers.1.mlp.experts.down_proj_weight_scale", r"layers.1.*w2_weight_scale"),
    ("gpt-oss", "modelopt", "layers.1.mlp.experts.gate_up_proj_weight_scale_2", r"layers.1.*w13_weight_scale_2"),
    ("gpt-oss", "modelopt", "layers.1.mlp.experts.gate_up_proj_input_scale", r"layers.1.*w13_input_scale"),
    ("gpt-oss", "modelopt", "layers.1.mlp.experts.down_proj", r"layers.1.*w2_weight"),
    ("moe", "modelopt", "layers.1.mlp.experts.2.up_proj.weight", r"layers.1.*w13_weight\[2\]"),
    ("dense", "modelopt", "layers.1.self_attn.v_proj.weight", r"layers.1.*qkv_proj.weight"),
    ("dense", "compressed-tensors", "layers.0.mlp.up_proj.weight_packed", r"layers.0.*gate_up_proj.weight_packed"),
    ("moe", "modelopt", "layers.1.mlp.experts.2.up_proj.weight_scale", r"layers.1.*w13_weight_scale\[2, 96, 0\]"),
    ("moe", "modelopt", "layers.1.mlp.experts.3.up_proj.input_scale", r"layers.1.*w13_input_scale\[3, 1\]"),
    (
        "moe",
        "compressed-tensors",
        "layers.0.mlp.experts.1.down_proj.weight_global_scale",
        r"layers.0.*w2_weight_.*\[1\]",
    ),
    ("dense", "modelopt", "layers.1.self_attn.k_proj.weight_scale_2", r"layers.1.*qkv_proj.weight_scale_2\[1\]"),
    ("dense", "compressed-tensors", "layers.1.mlp.up_proj.input_global_scale", r"layers.1.*input_global_scale\[1\]"),
]


def test_a_tensor_that_a_shard_lacks_is_named(miniatures, tmp_path):
    for number, (kind, layout, lost, _) in enumerate(LOST):
        drop(cast(miniatures[kind], tmp_path / f"{number}", layout, "w4a4"), f"model.{lost}")
    done = engine("vllm_loader", "--plugin", "--only-load", *(tmp_path / f"{number}" for number in range(len(LOST))))
    lines = done.stdout.splitlines()
    assert len(lines) == len(LOST), done.stdout + done.stderr[-3000:]
    for number, (line, (_, _, _, named)) in enumerate(zip(lines, LOST, strict=True)):
        assert re.search(
            rf"^{number}: not loaded: CheckpointError: .*{named}: nothing in the checkpoint filled it", line
        )


def drop(path, name):
    """Take a tensor out of its shard and out of the index."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shard = path / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_what_marlin_would_compute_for_gpt_oss_has_transformers_logits(tmp_path):
    """From the scales and biases that vLLM's own preparation and the plugin leave."""
    source = ROOT / "tests" / "fixtures" / "gpt-oss-tiny"
    done = engine("vllm_gpt_oss", "logits", source, cast(source, tmp_path / "dst"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_casting_while_loading_leaves_what_a_converted_checkpoint_does(miniatures, tmp_path):
    """The miniatures have half-blocks that need a shift, and gpt-oss's padding."""
    kinds = {"gpt-oss": "modelopt", "dense": "compressed-tensors", "moe": "compressed-tensors"}
    sources = {ROOT / "tests" / "fixtures" / "gpt-oss-tiny": "modelopt"} | {miniatures[k]: v for k, v in kinds.items()}
    for source, layout in sources.items():
        done = engine("vllm_gpt_oss", "on-load", source, cast(source, tmp_path / source.name, layout))
        assert done.returncode == 0 and re.search(r"\d\d parameters equal, 0 differ", done.stdout), (
            done.stdout + done.stderr[-3000:]
        )


def test_casting_while_loading_refuses_what_it_cannot_keep(miniatures, tmp_path):
    """An inexact domain, a tensor that a shard lacks, a family whose classes are its own: each by its name."""
    kinds = {"far": "gpt-oss", "lost": "gpt-oss", "far-moe": "moe", "lost-moe": "moe", "lost-dense": "dense"}
    far, lost, far_moe, lost_moe, lost_dense = sources = [
        Path(shutil.copytree(miniatures[kind], tmp_path / name)) for name, kind in kinds.items()
    ]
    module, expert = "model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.2.down_proj"
    for source, codes, scales in (
        (far, f"{module}_blocks", f"{module}_scales"),
        (far_moe, f"{expert}.weight_packed", f"{expert}.weight_scale"),
    ):
        edit(source, scales, lambda scales: np.put(scales, 10, 85))
        edit(source, codes, lambda codes: np.put(codes, range(160, 176), 0x61))  # .5 beside 4
    drop(lost, f"{module}_bias")
    drop(lost_moe, "model.layers.1.mlp.experts.3.up_proj.weight_scale")
    drop(lost_dense, "model.layers.1.self_attn.v_proj.weight_packed")
    options = ["--plugin", "--only-load", "--quantization", "fp4cast"]
    done = engine("vllm_loader", *options, *sources, miniatures["deepseek-v4"])
    inexact, missing = (
        r"InexactError: .*{}: exponents -?\d+ to -?\d+ span \d\d binades",
        "CheckpointError: .*{}: nothing",
    )
    said = (
        inexact.format("layers.0.mlp.experts.*w2"),
        missing.format("layers.0.mlp.experts.*w2_bias"),
        inexact.format(r"layers.1.mlp.experts.*w2\[2\]"),
        missing.format("layers.1.mlp.experts.*w13_weight_scale"),
        missing.format("layers.1.self_attn.qkv_proj_weight"),
        ".*--quantization fp4cast casts MXFP4 gpt-oss and .* while it is loaded; this is 'deepseek_v4'",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(said), done.stdout + done.stderr[-3000:]
    for line, words in zip(lines, said, strict=True):
        assert re.search(f": not loaded: {words}", line), line


def test_two_ranks_hold_gpt_oss_together(miniatures, tmp_path):
    done = engine("vllm_gpt_oss", "ranks", cast(miniatures["gpt-oss"], tmp_path / "dst"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("12 parameters equal, 0 differ") == 2


def test_vllm_loads_attention_in_fp8_exactly(tmp_path):
    """A whole Qwen3-MoE by its loader, as W4A16 and W4A4."""
    source = attention.qwen3_moe(tmp_path / "src")
    for activations in ("w4a16", "w4a4"):
        scales = 1.0 if activations == "w4a4" else None
        fp4cast.convert(source, tmp_path / activations, activations=activations, input_scales=scales, fp8="attention")
    done = engine("vllm_loader", tmp_path / "w4a16", tmp_path / "w4a4")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("20 projections equal, 0 differ") == 2, done.stdout


@pytest.mark.filterwarnings("ignore")
def test_the_merged_attention_of_kimi_k3_holds_what_the_files_say(tmp_path):
    """Every projection, in FP8 or not. What stays in BF16 would be wrong in FP8: the gate would have other scales."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    path = tmp_path / "dst"
    fp4cast.convert(attention.kimi_k3(tmp_path / "src"), path, fp8="attention")
    done = engine("vllm_kimi", path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(": ModelOptLinearMethod: equal") == len(attention.KDA_FP8 + attention.MLA_FP8)
    assert done.stdout.count(": UnquantizedLinearMethod: equal") == len(attention.MERGED_BADLY)
    config = json.loads((path / "config.json").read_text())
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        for module in (attention.LAYER.format(2) + name for name in attention.MERGED_BADLY):
            config["quantization_config"]["quantized_layers"][module] = {"quant_algo": "FP8_PB_WO"}
            if f"{module}.weight" in tensors:
                codes, scales = FP8QTensor.quantize(tensors[f"{module}.weight"], block_sizes={-2: 128, -1: 128})
                tensors[f"{module}.weight"] = codes._quantized_data
                tensors[f"{module}.weight_scale"] = scales[:, None, :, None].float()
        save_file(tensors, shard, {"format": "pt"})
    attention.index_anew(path)
    (path / "config.json").write_text(json.dumps(config))
    done = engine("vllm_kimi", path)
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if line.endswith("differs")]
    assert wrong == [f"{attention.LAYER.format(2)}fused_qkv_a_g_proj[g_proj]: ModelOptLinearMethod: differs"], (
        done.stdout + done.stderr[-3000:]
    )


def test_vllm_finds_the_plugin_by_its_entry_point(tmp_path):
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    info = tmp_path / "fp4cast-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fp4cast\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines]))
    program = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
print(type(ModelOptNvFp4Config.FusedMoEMethodCls).__module__, DefaultModelLoader.load_weights.fp4cast)
"""
    (tmp_path / "program.py").write_text(program)
    paths = os.pathsep.join(filter(None, (str(tmp_path), str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "VLLM_TARGET_DEVICE": "cpu"}
    done = subprocess.run(
        [PYTHON, tmp_path / "program.py"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["fp4cast.vllm.experts True"], done.stdout + done.stderr[-3000:]
