"""`fp4cast calibrate`: what it sees layer by layer is what a whole model in memory multiplies."""

import json
import shutil
import weakref
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import fp4cast  # noqa: E402
from fp4cast.checkpoint import open_checkpoint  # noqa: E402
from fp4cast.errors import (  # noqa: E402
    CheckpointError,
    DatasetError,
    DestinationError,
    QuantizerError,
    UnsupportedError,
    UsageError,
)
from fp4cast.miniature import make  # noqa: E402
from fp4cast.ptq import QFORMATS, attach, max_calibrate  # noqa: E402
from fp4cast.ptq.activations import calibrate  # noqa: E402
from fp4cast.ptq.data import open_dataset, split, tokenize  # noqa: E402
from fp4cast.ptq.held import input_amax  # noqa: E402
from fp4cast.ptq.layerwise import _Pool, run_layers  # noqa: E402
from fp4cast.ptq.load import empty_model, load_model, load_tokenizer  # noqa: E402
from fp4cast.ptq.observe import Observer  # noqa: E402
from fp4cast.ptq.weights import Weights  # noqa: E402
from fp4cast.sources import read_source  # noqa: E402
from test_cli import call, plain  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
FIXTURE = Path(__file__).parent / "fixtures" / "gpt-oss-tiny"
TEXT = str(FIXTURE / "calibration.txt")
FEW = {"dataset": TEXT, "calib_size": 10, "calib_seq": 64, "batch_size": 4, "device": "cpu"}
TINY = {"vocab_size": 1024, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def batches(path=FIXTURE):
    tokenizer = load_tokenizer(open_checkpoint(path))
    return split(tokenize(open_dataset(TEXT), tokenizer, FEW["calib_size"], FEW["calib_seq"]), FEW["batch_size"])


def mxfp4(weight):
    """Codes uint8 [N, K/2] and E8M0 [N, K/32] by the OCP rule, and the values that they mean."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    exponents = torch.frexp(blocks.abs().amax(-1)).exponent - 3
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    scaled = torch.ldexp(blocks, -exponents[..., None])
    codes = (scaled.abs()[..., None] - table).abs().argmin(-1)
    values = torch.ldexp(table[codes].copysign(scaled), exponents[..., None]).flatten(-2)
    codes = (codes + 8 * scaled.signbit()).to(torch.uint8).flatten(-2)
    return codes[:, 0::2] | codes[:, 1::2] << 4, (exponents + 127).to(torch.uint8), values


def fp8(weight):
    """FP8 codes of [N, K], an E8M0 scale for each 128 x 128, and the values that they mean."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    k = torch.randint(-9, -5, (rows, columns))
    steps = torch.exp2(k.float()).repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(weight), : weight.shape[1]]
    codes = (weight.float() / steps).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, (k + 127).to(torch.uint8).view(torch.float8_e8m0fnu), codes.float() * steps


def pack(model, path, keep):
    """Save a model as compressed-tensors would, its matrices in MXFP4, and beside it the values in BF16."""
    plain, tensors, values = save_plain(model, path), {}, {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if tensor.ndim == 2 and not any(word in name for word in keep):
            packed, scales, values[name] = mxfp4(tensor)
            tensors |= {f"{module}.weight_packed": packed, f"{module}.weight_scale": scales}
        else:
            tensors[name] = tensor
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 32}}}
    method = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    return finish(path, plain | values, tensors, {**method, "config_groups": groups, "ignore": []})


def pack_deepseek(model, path):
    """Save a DeepSeek-V4 as it is published: its own names, MXFP4 experts, FP8 beside them."""
    plain, tensors, values = save_plain(model, path), {}, {}
    for full, tensor in plain.items():
        name = full.removeprefix("model.").replace("embed_tokens", "embed")
        module = name.removesuffix(".weight")
        if ".ffn.experts." in name:
            packed, scales, values[full] = mxfp4(tensor)
            tensors |= {name: packed.view(torch.int8), f"{module}.scale": scales.view(torch.float8_e8m0fnu)}
        elif module.endswith((".wq_a", ".wq_b", ".wo_b", ".shared_experts.w2")):
            tensors[name], tensors[f"{module}.scale"], values[full] = fp8(tensor)
        else:
            tensors[name] = tensor
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    return finish(path, plain | values, tensors, method)


def save_plain(model, path):
    model.to(torch.bfloat16).save_pretrained(path / "bf16")
    plain = load_file(path / "bf16/model.safetensors")
    for name in [name for name in plain if name.endswith("gate.bias")]:
        plain[name] = torch.randn(plain[name].shape) * 1e-3 + 0.5  # FP32, as published: BF16 would choose other experts
    return plain


def finish(path, plain, tensors, quantization):
    """Both directories: the packed one, and one with the values that it means in BF16."""
    (path / "mxfp4").mkdir()
    save_file(tensors, path / "mxfp4/model.safetensors", {"format": "pt"})
    values = {name: value.bfloat16() if value.ndim == 2 else value for name, value in plain.items()}
    save_file(values, path / "bf16/model.safetensors", {"format": "pt"})
    config = json.loads((path / "bf16/config.json").read_text()) | {"quantization_config": quantization}
    (path / "mxfp4/config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "mxfp4" / name).write_bytes((FIXTURE / name).read_bytes())
    return path / "mxfp4"


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
    options = ["--activations", "w4a4", "--input-scales", tmp_path / "amax.json"]
    assert call("convert", FIXTURE, tmp_path / "dst", *options).exit_code == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"out": "amax.txt"}, UsageError, "expected a .json or .safetensors file"),
        ({"out": "none/amax.json"}, DestinationError, "is no directory"),
        ({"calib_size": 0}, UsageError, "calib_size: expected a positive number, got 0"),
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
