"""`ptq --low_memory_mode`: the same directory, byte for byte, from one layer in memory at a time."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import UnsupportedError
from fp4cast.ptq import QFORMATS, Headroom, Options, attach, flow, quantize
from fp4cast.ptq.layerwise import run
from fp4cast.ptq.layerwise.loop import LayerLoop
from fp4cast.ptq.layerwise.parameters import Weights
from fp4cast.ptq.load import empty_model
from helpers import call, contents, plain
from models import TINY, pack

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "gpt-oss-tiny"
TEXT = str(FIXTURE / "calibration.txt")
DATA = {"dataset": TEXT, "calib_size": 5, "calib_seq": 32, "batch_size": 3, "device": "cpu"}
CAST = {"cast_mxfp4_to_nvfp4": True}


def dense():
    config = transformers.LlamaConfig(**TINY, intermediate_size=96, num_hidden_layers=3, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def qwen3():
    config = transformers.Qwen3MoeConfig(
        **TINY, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_experts=16,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def llama4():
    config = transformers.Llama4TextConfig(
        **TINY, intermediate_size=64, intermediate_size_mlp=96, num_hidden_layers=2, num_local_experts=4,
        moe_layers=[1], pad_token_id=0,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name: in BF16, and in MXFP4 where the name says so."""
    torch.manual_seed(0)
    found = {"gpt-oss": FIXTURE}
    for make in (dense, qwen3, llama4):
        path = tmp_path_factory.mktemp(make.__name__)
        keep = ("embed", "lm_head", "self_attn", "mlp.gate.", "router")
        found[f"{make.__name__}, MXFP4"] = pack(make(), path, keep)
        found[make.__name__] = path / "plain"
        make().to(torch.bfloat16).save_pretrained(path / "plain")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / "plain" / name).write_bytes((FIXTURE / name).read_bytes())
    return found


CASES = {
    "the cast": ("gpt-oss", "nvfp4_experts_only", CAST | DATA),
    "attention quantized beside the cast": ("gpt-oss", "nvfp4", CAST | DATA),
    "requantized": ("gpt-oss", "nvfp4_mlp_only", DATA),
    "weights alone": ("gpt-oss", "w4a16_nvfp4", CAST),
    "weights alone, requantized": ("gpt-oss", "w4a16_nvfp4", {}),
    "headroom": ("gpt-oss", "nvfp4_mlp_only", {**CAST, **DATA, "act_headroom": Headroom()}),
    "dense": ("dense", "nvfp4", DATA),
    "dense, MXFP4": ("dense, MXFP4", "nvfp4", CAST | DATA | {"layout": "compressed-tensors"}),
    "experts": ("qwen3", "nvfp4", DATA),
    "experts, MXFP4": ("qwen3, MXFP4", "nvfp4_experts_only", CAST | DATA),
    "a scale for each": ("qwen3, MXFP4", "nvfp4_experts_only", {**CAST, **DATA, "input_scales_per": "expert"}),
    "an FP8 cache": ("gpt-oss", "nvfp4_experts_only", {**CAST, **DATA, "kv_cache_qformat": "fp8"}),
    "an FP8 cache alone": ("dense", "w4a16_nvfp4", {**DATA, "kv_cache_qformat": "fp8"}),
    "banks in BF16": ("llama4", "nvfp4_mlp_only", DATA),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_same_directory(models, tmp_path, monkeypatch, case):
    name, qformat, options = CASES[case]
    expected = quantize(Options(models[name], tmp_path / "whole", qformat, **options))
    monkeypatch.setattr(flow, "load_model", lambda *_: pytest.fail("the whole model was loaded"))
    found = quantize(Options(models[name], tmp_path / "layers", qformat, low_memory_mode=True, **options))
    assert contents(tmp_path / "layers") == contents(tmp_path / "whole")
    assert (found.lossless, found.exported.tensors) == (expected.lossless, expected.exported.tensors)


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """No parameter is, whenever the next layer is about to be read, and in the end."""
    made, seen = [], []
    empty, fill = flow.empty_model, run._filled
    monkeypatch.setattr(flow, "empty_model", lambda *args: made.append(empty(*args)) or made[-1])
    monkeypatch.setattr(run, "_filled", lambda *args: seen.append(real(made[-1])) or fill(*args))
    quantize(Options(FIXTURE, tmp_path / "dst", "nvfp4_mlp_only", low_memory_mode=True, **DATA))
    assert seen == [[]] * 5 and not real(made[-1])  # what surrounds the layers, and four of them


def real(model):
    return [name for name, parameter in model.named_parameters() if not parameter.is_meta]


def test_a_weight_outside_of_the_layers_is_refused():
    model = empty_model(open_checkpoint(FIXTURE))
    model.extra_proj = torch.nn.Linear(32, 32, device="meta")
    attach(model, QFORMATS["nvfp4"])
    with (
        Weights(open_checkpoint(FIXTURE), {}, model, "cpu") as weights,
        pytest.raises(
            UnsupportedError, match=r"--low_memory_mode runs model.layers.\* one by one, but extra_proj.weight"
        ),
    ):
        LayerLoop(model, weights, [], 0, lambda *_: None)


def test_the_command_accepts_it(tmp_path):
    args = ["--model", FIXTURE, "--qformat", "w4a16_nvfp4", "--export_path", tmp_path / "dst", "--low-memory-mode"]
    assert "exact" in plain(call("ptq", *args, "--cast_mxfp4_to_nvfp4").stdout)
