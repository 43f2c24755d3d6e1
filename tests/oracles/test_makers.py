"""What the makers of formats export themselves is recognised, cast, and holds the values that they say."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.families.recognise import read_source
from fp4cast.formats import mxfp4_values
from helpers import raw

FIXTURES = Path(__file__).parents[1] / "fixtures"


# --- AMD Quark, by hand: tests/fixtures/make_quark.py ---------------------------------------------------------------


@pytest.fixture(scope="module")
def quark():
    return json.loads((FIXTURES / "quark.json").read_text())


def array(document, key, dtype, *shape):
    return np.frombuffer(base64.b64decode(document[key]), dtype).reshape(shape)


def test_quark_s_bytes_are_its_own_quantizer_s_values(quark, tmp_path):
    codes, scales = array(quark, "codes", np.uint8, 32, 32), array(quark, "scales", np.uint8, 32, 2)
    values = array(quark, "values_float32", "<f4", 32, 64)
    np.testing.assert_array_equal(mxfp4_values(codes, scales), values)
    assert scales[0].tolist() == [1, 1], "a block of zeros"
    module = quark["module"]
    tensors = {f"{module}.weight": ("U8", codes), f"{module}.weight_scale": ("U8", scales)}
    config = {"quantization_config": quark["quantization_config"]}
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": tensors}, config)
    assert read_source(open_checkpoint(tmp_path / "src")).family.name == "quark"
    assert fp4cast.convert(tmp_path / "src", tmp_path / "dst").exact


def test_the_miniature_is_described_as_quark_describes_it(quark, miniatures):
    config = json.loads((miniatures["quark"] / "config.json").read_text())["quantization_config"]
    assert config == quark["quantization_config"]
    kinds = {(name.split(".")[-2:][-1], dtype) for name, (dtype, _) in quark["tensors"].items()}
    ours = {(n.rpartition(".")[2], t.dtype) for n, t in open_checkpoint(miniatures["quark"]).tensors.items()}
    assert ours == kinds == {("weight", "BF16"), ("weight", "U8"), ("weight_scale", "U8")}


# --- the same weights under other names ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "other"), [("quark", "dense"), ("modelopt-mxfp4", "moe"), ("mlx-mxfp4", "moe")])
@pytest.mark.parametrize("activations", ["w4a16", "w4a4"])
def test_their_result_is_that_of_compressed_tensors(miniatures, tmp_path, kind, other, activations):
    """So the rows of `families.services` about one hold for the other."""
    scales = 0.5 if activations == "w4a4" else None
    results = []
    for name in (kind, other):
        fp4cast.convert(miniatures[name], tmp_path / name, activations=activations, input_scales=scales)
        tensors = open_checkpoint(tmp_path / name).tensors
        held = {n: (t.dtype, t.shape, raw(tmp_path / name, n).tobytes()) for n, t in tensors.items()}
        results.append((held, *(json.loads((tmp_path / name / f).read_text()) for f in DOCUMENTS)))
    assert results[0] == results[1]


DOCUMENTS = ("config.json", "hf_quant_config.json")


# --- nvidia-modelopt's own export -------------------------------------------------------------------------------------


def tiny_model(kind):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 256, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)).bfloat16()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("rules", ["MXFP4_DEFAULT_CFG", "W4A8_MXFP4_FP8_CFG", "MXFP4_MLP_WEIGHT_ONLY_CFG"])
def test_modelopt_s_own_export_is_cast_exactly(tmp_path, kind, rules):
    torch = pytest.importorskip("torch", reason="the oracles need torch: ./dev test installs them")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import MXFP4QTensor
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = tiny_model(kind)
    model.config.architectures = [type(model).__name__]
    mtq.quantize(model, getattr(mtq, rules), lambda m: m(torch.arange(64)[None] % 256))
    export_hf_checkpoint(model, export_dir=tmp_path / "src")
    source = read_source(open_checkpoint(tmp_path / "src"))
    assert source.family.name == "modelopt-mxfp4"
    report = fp4cast.convert(tmp_path / "src", tmp_path / "dst")
    assert report.exact
    experts, attention = (3 if kind == "dense" else 12), 0 if "MLP" in rules else 4
    assert report.tensors["cast"] == experts + attention
    before, after = load_file(tmp_path / "src" / "model.safetensors"), load_file(tmp_path / "dst" / "model.safetensors")
    for module, pair in source.pairs.items():
        codes, scales = before[f"{module}.weight"], before[f"{module}.weight_scale"]
        theirs = MXFP4QTensor(torch.Size(pair.shape), torch.float32, codes).dequantize(
            torch.float32, scale=scales, block_sizes=[32]
        )
        np.testing.assert_array_equal(mxfp4_values(codes.numpy(), scales.numpy(), pair.bias), theirs.numpy())
        assert torch.equal(after[f"{module}.weight"], codes), "no half-block needs a shift"


# --- MLX, by hand: tests/fixtures/make_mlx.py -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlx():
    return json.loads((FIXTURES / "mlx.json").read_text())


def test_mlx_reads_the_same_values(mlx):
    """Words of eight codes are the same bytes; scales are biased by 127."""
    rows, columns = mlx["shape"]
    codes, scales = (array(mlx, key, np.uint8, rows, -1) for key in ("codes", "scales"))
    values = array(mlx, "values_float32", "<f4", rows, columns)
    np.testing.assert_array_equal(mxfp4_values(codes, scales), values)
    assert {1, 17, 126, 127, 150, 200} <= set(scales.ravel().tolist())


def test_the_miniature_is_saved_as_mlx_lm_saves_it(mlx, miniatures):
    config = json.loads((miniatures["mlx-mxfp4"] / "config.json").read_text())
    assert {key: config[key] for key in mlx["config"]} == mlx["config"]
    checkpoint = open_checkpoint(miniatures["mlx-mxfp4"])
    assert all(shard.metadata == mlx["metadata"] for shard in checkpoint.shards.values())
    of_one_layer = {n: [t.dtype, list(t.shape)] for n, t in checkpoint.tensors.items() if ".layers.1." not in n}
    assert of_one_layer == mlx["tensors"]


def test_its_file_no_longer_says_that_it_is_mlx_s(converted):
    assert all(s.metadata == {"format": "pt"} for s in open_checkpoint(converted["mlx-mxfp4"]).shards.values())
    assert "quantization" not in json.loads((converted["mlx-mxfp4"] / "config.json").read_text())
