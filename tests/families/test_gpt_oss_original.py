"""OpenAI's own layout of gpt-oss becomes what the Hub's becomes, tensor for tensor, and a config that loads.

By hand, 2026-11-25: gpt_oss/torch/model.py of openai/gpt-oss at 7b58334 on the miniature, and transformers with
fp4cast.hf on its result, in FP32 on a CPU: every expert equal, logits of 300 tokens at most 3e-7 apart.
"""

import json
import shutil

import pytest

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import CheckpointError, ShapeError, UnsupportedError
from fp4cast.families.recognise import read_source
from helpers import raw


def test_every_tensor_is_that_of_the_hub_s_layout(converted):
    ours, theirs = (open_checkpoint(converted[kind]).tensors for kind in ("gpt-oss-original", "gpt-oss"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert (raw(converted["gpt-oss-original"], name) == raw(converted["gpt-oss"], name)).all(), name


def test_its_quantization_is_described_as_that_of_the_hub_s(converted):
    for file in ("config.json", "hf_quant_config.json"):
        ours, theirs = (json.loads((converted[kind] / file).read_text()) for kind in ("gpt-oss-original", "gpt-oss"))
        key = "quantization_config" if file == "config.json" else "quantization"
        assert ours[key] == theirs[key]


@pytest.mark.oracle
def test_transformers_reads_the_config_that_it_would_have_made(miniatures, converted):
    transformers = pytest.importorskip("transformers", reason="the oracles need it: ./dev test installs them")
    theirs = json.loads((miniatures["gpt-oss-original"] / "config.json").read_text())
    scaling = {
        "beta_fast": float(theirs.pop("rope_ntk_beta")),
        "beta_slow": float(theirs.pop("rope_ntk_alpha")),
        "factor": float(theirs.pop("rope_scaling_factor")),
        "rope_type": "yarn",
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
    experts, chosen = theirs.pop("num_experts"), theirs["experts_per_token"]
    expected = transformers.GptOssConfig(
        num_local_experts=experts, num_experts_per_tok=chosen, rope_scaling=scaling, **theirs
    ).to_dict()
    found = transformers.AutoConfig.from_pretrained(converted["gpt-oss-original"]).to_dict()
    asked = {"architectures", "dtype", "quantization_config", "transformers_version", "_name_or_path", "attention_bias"}
    for key in expected.keys() - asked:
        assert found[key] == expected[key], key


def changed(miniatures, tmp_path, change):
    source = shutil.copytree(miniatures["gpt-oss-original"], tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    change(config)
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize("value", [None, "64", True, -1, [1], float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize("key", ["head_dim", "rope_ntk_alpha", "num_experts", "vocab_size"])
def test_a_number_that_the_config_lacks_is_named(miniatures, tmp_path, key, value):
    source = changed(miniatures, tmp_path, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .*expected a number"):
        fp4cast.convert(source, tmp_path / "dst")


def test_rows_that_do_not_follow_from_the_heads_are_refused(miniatures, tmp_path):
    source = changed(miniatures, tmp_path, lambda config: config.update(num_key_value_heads=1))
    with pytest.raises(ShapeError, match=r"block\.0\.attn\.qkv\.\w+ .*: expected 96 rows"):
        fp4cast.inspect(source)


def test_a_tensor_of_another_model_is_named(miniatures, tmp_path):
    source = shutil.copytree(miniatures["gpt-oss-original"], tmp_path / "src")
    for path in [source / "model.safetensors.index.json", *source.glob("*.safetensors")]:
        path.write_bytes(path.read_bytes().replace(b"block.1.attn.sinks", b"block.1.attn.stinks"[:18]))
    with pytest.raises(UnsupportedError, match=r"block\.1\.attn\.stink .*expected a tensor of gpt-oss"):
        read_source(open_checkpoint(source))


def test_more_layers_than_tensors_are_refused(miniatures, tmp_path):
    """A config can claim any number; a list of as many words must not be made."""
    source = changed(miniatures, tmp_path, lambda config: config.update(num_hidden_layers=10**12))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1000000000000, but there are"):
        fp4cast.inspect(source)


def test_no_rows_are_no_heads(miniatures, tmp_path):
    source = changed(miniatures, tmp_path, lambda config: config.update(head_dim=0))
    with pytest.raises(ShapeError, match="expected 0 rows"):
        fp4cast.inspect(source)
