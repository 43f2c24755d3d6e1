"""llama.cpp computes with NVFP4 files what it computes with MXFP4 ones, and applies the tensor scales that we write.

Needs llama-cpp-python, which compiles llama.cpp in some minutes: `pip install llama-cpp-python==0.3.36`. Skipped
without it.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")
if importlib.util.find_spec("llama_cpp") is None:
    pytest.skip("llama-cpp-python is not installed", allow_module_level=True)

from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter

import fp4cast
from fp4cast.layouts.gguf import scale_name
from gguf_files import records

HERE = Path(__file__).parent
WORDS, HIDDEN, EXPERTS = 64, 128, 4
# (architecture, whether it has experts)
MODELS = [
    ("qwen3moe", True), ("llama", True), ("mistral3", True), ("gpt-oss", True), ("llama", False), ("mistral3", False),
    ("qwen3", False),
]  # fmt: skip


def logits(path):
    out = path.with_suffix(".npy")
    command = [sys.executable, str(HERE / "llama_logits.py"), str(path), str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return np.load(out)


def head(path, architecture, moe):
    writer = GGUFWriter(path, architecture)
    for name, value in {
        "block_count": 2, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": HIDDEN,
        "expert_feed_forward_length": HIDDEN, "expert_count": EXPERTS if moe else 0,
        "expert_used_count": 2 if moe else 0, "head_count": 2, "head_count_kv": 1, "key_length": 64,
        "value_length": 64, "rope_dimension_count": 64, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4,
        "vocab_size": WORDS, "sliding_window": 32, "tokenizer_model": "llama", "file_type": 38,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(WORDS - 3))])
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types([2, 3, 3] + [1] * (WORDS - 3))
    return writer


def model(path, architecture, moe, low, high):
    """A model of two layers, its experts (or all of its matrices) in MXFP4."""
    rng, writer = np.random.default_rng(0), head(path, architecture, moe)

    def plain(name, *shape, scale=0.1):
        writer.add_tensor(name, (rng.normal(size=shape) * scale).astype(np.float32))

    def packed(name, *shape):
        writer.add_tensor(name, records(rng, shape, low, high), raw_dtype=Type.MXFP4)

    plain("token_embd.weight", WORDS, HIDDEN, scale=1)
    plain("output.weight", WORDS, HIDDEN)
    ones = ["output_norm"]
    for at in ("blk.0", "blk.1"):
        ones += [f"{at}.attn_norm", f"{at}.{'post_attention' if architecture == 'gpt-oss' else 'ffn'}_norm"]
        matrix = plain if moe else packed
        for name, rows in (("q", 128), ("k", 64), ("v", 64), ("output", HIDDEN)):
            matrix(f"{at}.attn_{name}.weight", rows, 128)
            if architecture == "gpt-oss":
                plain(f"{at}.attn_{name}.bias", rows)
        if moe:
            plain(f"{at}.ffn_gate_inp.weight", EXPERTS, HIDDEN)
        for name in ("gate", "up", "down"):
            if moe:
                packed(f"{at}.ffn_{name}_exps.weight", EXPERTS, HIDDEN, HIDDEN)
            else:
                packed(f"{at}.ffn_{name}.weight", HIDDEN, HIDDEN)
            if architecture == "gpt-oss":
                plain(f"{at}.ffn_{name}_exps.bias", EXPERTS, HIDDEN)
        if architecture == "gpt-oss":
            plain(f"{at}.ffn_gate_inp.bias", EXPERTS)
            plain(f"{at}.attn_sinks.weight", 2)
        elif architecture.startswith("qwen3"):
            ones += [f"{at}.attn_q_norm", f"{at}.attn_k_norm"]
    for name in ones:
        size = 64 if name.endswith(("q_norm", "k_norm")) else HIDDEN
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))
    return close(writer, path)


def close(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_scales(source, path, value):
    """A copy with a tensor scale beside each bank of experts."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            array = entry.types[0] == GGUFValueType.ARRAY
            writer.add_key_value(key, entry.contents(), entry.types[0], entry.types[-1] if array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        if tensor.name.endswith("_exps.weight"):
            writer.add_tensor(tensor.name.replace("weight", "scale"), np.full(EXPERTS, value, np.float32))
    return close(writer, path)


@pytest.mark.parametrize(("architecture", "moe"), MODELS)
@pytest.mark.parametrize(("low", "high"), [(-9, -2), (-20, -7)])
def test_the_same_logits(tmp_path, architecture, moe, low, high):
    if architecture == "gpt-oss" and low < -9:
        pytest.skip("is refused: tests/conversion/test_convert_gguf.py")
    source = model(tmp_path / "a.gguf", architecture, moe, low, high)
    assert fp4cast.convert(source, tmp_path / "b.gguf").exact
    before, after = logits(source), logits(tmp_path / "b.gguf")
    assert np.abs(before).max() > 1
    assert np.abs(before - after).max() < 1e-4
    assert any(tensor.name.endswith(".scale") for tensor in GGUFReader(tmp_path / "b.gguf").tensors) == (low < -9)


@pytest.mark.parametrize(("architecture", "moe"), MODELS)
def test_each_scale_is_applied_where_we_say_so(tmp_path, architecture, moe):
    source = model(tmp_path / "a.gguf", architecture, moe, -9, -2)
    if moe:
        fp4cast.convert(source, tmp_path / "b.gguf")
        changed = with_scales(tmp_path / "b.gguf", tmp_path / "c.gguf", 64.0)
        applied = scale_name(architecture, "blk.0.ffn_up_exps.weight", 3) is not None
        assert (np.abs(logits(changed) - logits(source)).max() > 0.01) == applied
        return
    source = model(tmp_path / "a.gguf", architecture, moe, -20, -7)
    fp4cast.convert(source, tmp_path / "b.gguf")
    whole, expected = (tmp_path / "b.gguf").read_bytes(), logits(source)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        (tmp_path / "b.gguf").write_bytes(whole)
        reader = GGUFReader(tmp_path / "b.gguf", "r+")
        for tensor in reader.tensors:
            if tensor.name.endswith(f"{name}.scale"):
                tensor.data[:] *= 2.0**12
        reader.data.flush()
        assert np.abs(logits(tmp_path / "b.gguf") - expected).max() > 1e-5, name
