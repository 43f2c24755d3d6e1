"""MLX's own decoder against ours, and mlx-lm's own loader on what `--layout mlx` writes. On a CPU."""

import json

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx[cpu] and mlx-lm are installed by hand")

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.formats import mxfp4_values, nvfp4_values
from fp4cast.layouts.mlx import mode_of, mxfp4_modules

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


def decoded(codes, scales, mode, group):
    words, scales = mx.array(codes.view("<u4")), mx.array(scales)
    found = mx.dequantize(words, scales, group_size=group, bits=4, mode=mode, dtype=mx.float32)
    return np.asarray(found).astype(np.float64)


def test_every_code_under_every_scale():
    codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (256, 1))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    one, other = decoded(codes, scales, "mxfp4", 32), mxfp4_values(codes, scales)
    assert np.array_equal(one[:253], other[:253])  # 2^126 * 6 exceeds FP32
    one, other = decoded(codes, scales.repeat(2, 1), "nvfp4", 16), nvfp4_values(codes, scales.repeat(2, 1), 1.0)
    assert np.array_equal(one, other, equal_nan=True)
    assert np.array_equal(np.signbit(one[:127]), np.signbit(other[:127]))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small Llama as mlx-lm quantizes and saves it; its attention in affine."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import quantize_model, save_config, save_model

    path = tmp_path_factory.mktemp("mlx") / "mxfp4"
    config = {
        "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    kinds = {"mlp": {"group_size": 32, "bits": 4, "mode": "mxfp4"}, "self_attn": {"group_size": 32, "bits": 8}}

    def how(name, _):
        return next((kind for part, kind in kinds.items() if f".{part}." in name), False)

    model, config = quantize_model(model, config, 32, 4, mode="mxfp4", quant_predicate=how)
    mx.eval(tree_flatten(model.parameters()))
    save_model(path, model)
    save_config(config, path / "config.json")
    return path


def test_mlx_lm_loads_the_same_model(source, tmp_path):
    from mlx_lm.utils import load_model

    report = fp4cast.convert(source, tmp_path / "nvfp4", layout="mlx")
    assert report.exact
    assert report.tensors["cast"] == 6
    (before, _), (after, config) = load_model(source), load_model(tmp_path / "nvfp4")
    tokens = mx.array([[1, 5, 9, 3, 7, 2]])
    one, other = np.asarray(before(tokens)), np.asarray(after(tokens))
    assert np.abs(one).max() > 0.01
    assert np.abs(one - other).max() < 1e-5
    for layer, new in zip(before.layers, after.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            a, b = layer.mlp[name], new.mlp[name]
            assert (b.mode, b.group_size, b.bits) == ("nvfp4", 16, 4)
            values = [
                mx.dequantize(each.weight, each.scales, group_size=each.group_size, bits=4, mode=each.mode)
                for each in (a, b)
            ]
            assert np.array_equal(*(np.asarray(each.astype(mx.float32)) for each in values))
    assert config["quantization"] == json.loads((tmp_path / "nvfp4" / "config.json").read_text())["quantization"]


def test_we_read_modes_as_mlx_lm_writes_them(source):
    checkpoint = open_checkpoint(source)
    modules = list(mxfp4_modules(checkpoint.tensors))
    assert len(modules) == 6
    assert {mode_of(checkpoint.config, module) for module in modules} == {"mxfp4"}
    assert mode_of(checkpoint.config, "model.layers.0.self_attn.q_proj") == "affine"
