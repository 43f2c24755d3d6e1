"""`fp4cast calibrate`: what it sees layer by layer is what a whole model in memory multiplies."""

import json
import shutil
import weakref
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import (
    CheckpointError,
    DatasetError,
    DestinationError,
    QuantizerError,
    UnsupportedError,
    UsageError,
)
from fp4cast.families.recognise import read_source
from fp4cast.miniatures import make
from fp4cast.ptq import QFORMATS, attach, max_calibrate
from fp4cast.ptq.data import open_dataset, split, tokenize
from fp4cast.ptq.layerwise.calibrate import calibrate
from fp4cast.ptq.layerwise.observer import Observer
from fp4cast.ptq.layerwise.parameters import Weights
from fp4cast.ptq.layerwise.run import _Pool, run_layers
from fp4cast.ptq.load import empty_model, load_model, load_tokenizer
from fp4cast.ptq.model_weights import input_amax
from helpers import call, plain
from models import TINY, pack, pack_deepseek

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "gpt-oss-tiny"
TEXT = str(FIXTURE / "calibration.txt")
FEW = {"dataset": TEXT, "calib_size": 10, "calib_seq": 64, "batch_size": 4, "device": "cpu"}


def batches(path=FIXTURE):
    tokenizer = load_tokenizer(open_checkpoint(path))
    return split(tokenize(open_dataset(TEXT), tokenizer, FEW["calib_size"], FEW["calib_seq"]), FEW["batch_size"])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, intermediate_size=96, num_hidden_layers=3)
    return pack(transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("dense"), ("embed", "lm_head"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(
        **TINY, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_experts=64,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    keep = ("embed", "lm_head", "self_attn", "mlp.gate.")
    return pack(transformers.Qwen3MoeForCausalLM(config), tmp_path_factory.mktemp("moe"), keep)


# --- what it sees -----------------------------------------------------------------------------------------------------


def test_gpt_oss_layer_by_layer_sees_what_the_whole_model_does(tmp_path):
    model = load_model(open_checkpoint(FIXTURE), "cpu")
    attach(model, QFORMATS["nvfp4_mlp_only"], static=True)
    max_calibrate(model, lambda model: [model.base_model(input_ids=batch, use_cache=False) for batch in batches()])
    found = calibrate(FIXTURE, tmp_path / "amax.json", **FEW)
    assert found.amax == input_amax(model) == json.loads((tmp_path / "amax.json").read_text())
    assert found.idle == 0 and found.samples == 10 and found.tokens == 640


def test_a_dense_model(dense, tmp_path):
    """Against hooks on the modules of a model that holds the same values in BF16."""
    seen = {}

    def look(name):
        def hook(_, args):
            seen[name] = max(seen.get(name, 0.0), float(args[0].abs().amax()))

        return hook

    model = transformers.AutoModelForCausalLM.from_pretrained(dense.parent / "bf16", dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch)
    found = calibrate(dense, tmp_path / "amax.safetensors", **FEW)
    assert found.amax == seen and len(seen) == 21
    report = fp4cast.convert(dense, tmp_path / "dst", activations="w4a4", input_scales=tmp_path / "amax.safetensors")
    assert report.exact and fp4cast.verify(dense, tmp_path / "dst").ok


def products_of_experts(path, leaves, run):
    """Amax by expert and projection of a whole model that holds the same values in BF16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, experts_implementation="eager"
    )
    seen = {}

    def record(module, args):
        hidden, chosen, _ = args
        for expert in range(module.num_experts):
            states = hidden[(chosen == expert).any(dim=-1)]
            if len(states):
                both = torch.nn.functional.linear(states, module.gate_up_proj[expert])
                gate, up = both.chunk(2, dim=-1)
                inner = module._apply_gate(both) if hasattr(module, "limit") else module.act_fn(gate) * up
                for leaf, x in zip(leaves, (states, states, inner), strict=True):
                    name = f"{module.name}.{expert}.{leaf}"
                    seen[name] = max(seen.get(name, 0.0), float(x.abs().amax()))

    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.name = name
            module.register_forward_pre_hook(record)
    with torch.no_grad():
        for batch in run:
            model(input_ids=batch)
    return seen


def check_experts(found, seen):
    """What was seen, and for experts that saw nothing the largest of the others of their layer."""
    assert {name: found.amax[name] for name in seen} == seen
    for name in found.amax.keys() - seen.keys():
        bank, leaf = name.partition(".experts.")[0], name.rpartition(".")[2]
        others = [value for other, value in seen.items() if other.startswith(f"{bank}.") and other.endswith(f".{leaf}")]
        assert found.amax[name] == max(others)


def test_experts_one_by_one(moe, tmp_path):
    seen = products_of_experts(moe.parent / "bf16", ("gate_proj", "up_proj", "down_proj"), batches(moe))
    found = calibrate(moe, tmp_path / "amax.json", **FEW)
    assert found.idle == len(found.amax) - len(seen) > 0
    check_experts(found, seen)
    assert fp4cast.convert(moe, tmp_path / "dst", activations="w4a4", input_scales=found.amax).exact


def test_deepseek_v4(tmp_path):
    """Names and formats of its own: transformers renames them, FP8 neighbours are dequantized."""
    torch.manual_seed(2)
    config = transformers.DeepseekV4Config(
        vocab_size=1024, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        head_dim=32, q_lora_rank=32, num_experts_per_tok=2, n_routed_experts=8, o_groups=2, o_lora_rank=16,
        index_n_heads=2, index_head_dim=16, index_topk=8, partial_rotary_factor=0.5, sliding_window=32,
        num_hash_layers=1, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = pack_deepseek(transformers.DeepseekV4ForCausalLM(config), tmp_path)
    seen = products_of_experts(tmp_path / "bf16", ("w1", "w3", "w2"), batches(path))
    found = calibrate(path, tmp_path / "amax.json", **FEW)
    assert len(found.amax) == 4 * 8 * 3
    check_experts(found, {name.replace("model.", "").replace(".mlp.", ".ffn."): value for name, value in seen.items()})
    assert fp4cast.convert(path, tmp_path / "dst", activations="w4a4", input_scales=tmp_path / "amax.json").exact


@pytest.mark.parametrize("last", [True, False])
def test_a_nan_is_never_lost(tmp_path, last):
    """Whichever expert sees it, whatever the others see."""
    path = shutil.copytree(FIXTURE, tmp_path / "src")
    tensors = load_file(path / "model.safetensors")
    bias = tensors["model.layers.1.mlp.experts.gate_up_proj_bias"]
    bias[-1 if last else 0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        QuantizerError, match=r"layers.1.mlp.experts.down_proj: its input reached nan on calibration data"
    ):
        calibrate(path, tmp_path / "amax.json", **FEW)
    assert not (tmp_path / "amax.json").exists()


def test_masks_are_kept_once():
    pool, mask = _Pool(), torch.ones(2, 1, 8, 8)
    assert pool(mask) is pool(mask.clone()) is not pool(mask.bool())
    assert pool(2 * mask) is not pool(mask)


def test_weights_that_no_layer_holds_are_refused_at_once(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, intermediate_size=96, num_hidden_layers=2)
    path = pack(transformers.LlamaForCausalLM(config), tmp_path, ("embed",))
    with pytest.raises(UnsupportedError, match="1 MXFP4 weights, the first is lm_head, belong to none of the 2 layers"):
        calibrate(path, tmp_path / "amax.json", **FEW, progress=lambda *_: pytest.fail("a layer was run"))


def test_one_layer_at_a_time_is_in_memory():
    """When a tensor is read, nobody holds a parameter of the layers before."""
    checkpoint = open_checkpoint(FIXTURE)
    model, run, alive = empty_model(checkpoint), [], []
    decoder, seen = model.get_decoder(), []

    class Watching(Weights):
        def read(self, parameter, *args):
            alive.append((parameter, sum(each() is not None for each in seen)))
            return super().read(parameter, *args)

    def remember(layer):
        def hook(*_):
            real = [i for i, each in enumerate(decoder.layers) if not next(each.parameters()).is_meta]
            run.append((layer, tuple(real)))
            seen.extend(weakref.ref(parameter) for parameter in decoder.layers[layer].parameters())

        return hook

    for i, layer in enumerate(decoder.layers):
        layer.self_attn.register_forward_pre_hook(remember(i))
    steps = []
    with Watching(checkpoint, read_source(checkpoint).pairs, model, "cpu") as weights:
        run_layers(model, weights, batches(), Observer(), lambda *step: steps.append(step))
    assert set(run) == {(i, (i,)) for i in range(4)} and len(run) == 4 * len(batches())
    assert len(alive) > 4 * 10 and not any(count for _, count in alive)
    assert steps == [(1, 4)] * 4 and all(parameter.is_meta for parameter in decoder.parameters())


def test_weights_are_those_that_transformers_loads():
    model = load_model(open_checkpoint(FIXTURE), "cpu")
    checkpoint = open_checkpoint(FIXTURE)
    with Weights(checkpoint, read_source(checkpoint).pairs, model, "cpu") as weights:
        for name, parameter in model.named_parameters():
            found = weights.read(name, parameter.shape, torch.bfloat16)
            assert torch.equal(found.view(torch.int16), parameter.view(torch.int16)), name


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_and_what_it_says_to_do_next(tmp_path):
    args = [
        "calibrate",
        FIXTURE,
        "--out",
        tmp_path / "amax.json",
        "--dataset",
        TEXT,
        "--calib-size",
        3,
        "--calib_seq",
        32,
    ]
    result = call(*args)
    assert result.exit_code == 0, result.stderr
    assert "8, with an amax from" in plain(result.stdout) and "3 samples, 96 tokens" in plain(result.stdout)
    assert "--activations w4a4 --input-scales" in plain(result.stdout)
    assert call(*args).exit_code == 1
    document = json.loads(call(*args, "--overwrite", "--json").stdout)
    assert document["modules"] == 8 and document["idle"] == 0 and document["tokens"] == 96
    twice = ["--dataset", f"{TEXT},{TEXT}", "--calib_size", "2,3", "--overwrite", "--json"]
    assert json.loads(call(*args[:4], *twice, "--calib_seq", 16).stdout)["tokens"] == (2 + 3) * 16
    options = ["--activations", "w4a4", "--input-scales", tmp_path / "amax.json"]
    assert call("convert", FIXTURE, tmp_path / "dst", *options).exit_code == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"out": "amax.txt"}, UsageError, "expected a .json or .safetensors file"),
        ({"out": "none/amax.json"}, DestinationError, "is not a directory"),
        ({"calib_size": 0}, UsageError, "calib_size: expected at least 1, got 0"),
        ({"calib_size": [3, 4]}, UsageError, "expected one size for each of 1 datasets, got 2"),
        ({"dataset": "nothing.txt"}, DatasetError, "no such file"),
        ({"device": "tpu"}, UsageError, "expected cpu, cuda"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, error, words):
    out = tmp_path / options.pop("out", "amax.json")
    with pytest.raises(error, match=words):
        calibrate(FIXTURE, out, **{**FEW, **options})
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_run(dense, tmp_path):
    with pytest.raises(CheckpointError, match="transformers cannot load the"):
        calibrate(make("kimi-k3", tmp_path / "kimi"), tmp_path / "amax.json", **FEW)
    with pytest.raises(UnsupportedError, match="BF16"):
        calibrate(dense.parent / "bf16", tmp_path / "amax.json", **FEW)
    assert not (tmp_path / "amax.json").exists()
