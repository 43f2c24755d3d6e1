"""The GPU benchmark of vLLM: its models are what they are compared with, and a variant that fails is a row."""

import argparse
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import serve
import serve_models

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gpt-oss-256-routed"])
def test_a_cast_has_the_logits_of_its_twin(tmp_path, name):
    pytest.importorskip("fp4cast.hf")
    paths = serve_models.make(name, tmp_path)
    tokens = torch.randint(2, 500, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [
            transformers.AutoModelForCausalLM.from_pretrained(paths[variant], dtype=torch.bfloat16)
            .eval()(tokens)
            .logits
            for variant in ("bf16", "modelopt")
        ]
    assert torch.equal(*found) and found[0].float().std() > 1


def run(monkeypatch, tmp_path, found):
    """Measure a model with what `found` says of each checkpoint instead of serving it."""
    monkeypatch.setattr(serve, "make", lambda _, path, **__: {v: path / v for v in ("bf16", "mxfp4", "modelopt")})
    monkeypatch.setattr(serve, "apart", lambda _, label, *__, **___: found[label])
    return {row["variant"]: row for row in serve.measure("gpt-oss-256", arguments(), tmp_path)}


def arguments(variants=None):
    return argparse.Namespace(
        make=False, graphs=False, attention="auto", seconds=1, tensor_parallel=1, rates=False, dir=None,
        variants=variants,
    )  # fmt: skip


def served(shift, greedy=0):
    return {
        "logprobs": [[-1.0, -2.0 + shift]] * 3,
        "greedy": [[greedy]] * 3,
        "load_seconds": 1.0,
        "device": "none",
    }


MEASURED = {"loader": {"seconds": 2.0, "peak_bytes": 3 << 20}, "rates": {"decode": 4000.0}}


def test_rows_are_compared_with_the_twin_and_failures_are_rows(monkeypatch, tmp_path):
    rows = run(
        monkeypatch,
        tmp_path,
        {
            "bf16": (served(0), ""),
            "mxfp4": (served(0.05) | MEASURED, "INFO] fp4cast: 12 scales are loaded"),
            "mxfp4, Marlin": (served(0.04), ""),
            "modelopt": (served(0.7, greedy=1), ""),
            "cast on load": (None, "exit status 1\nKeyError: 'w2_bias'"),
        },
    )
    assert rows["mxfp4"]["kept"] and rows["mxfp4"]["greedy_equal"] == 3 and rows["mxfp4"]["log"]
    assert not rows["modelopt"]["kept"] and rows["modelopt"]["greedy_equal"] == 0 and serve.is_wrong(rows["modelopt"])
    assert rows["modelopt"]["max_delta"] == pytest.approx(0.7)
    assert "w2_bias" in rows["cast on load"]["error"]
    assert all(serve.describe(row) for row in rows.values())
    assert "loaded in 2.0 s, peak 3 MiB  decode 4,000 tokens/s" in serve.describe(rows["mxfp4"])


def test_chosen_variants_run_beside_the_twin(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "make", lambda _, path, **__: {v: path / v for v in ("bf16", "mxfp4", "modelopt")})
    monkeypatch.setattr(serve, "apart", lambda *_, **__: (served(0), ""))
    rows = serve.measure("gpt-oss-256", arguments(["Marlin", "load"]), tmp_path)
    assert [row["variant"] for row in rows] == ["bf16", "mxfp4, Marlin", "cast on load"]


def test_a_model_that_was_made_is_used_again(tmp_path):
    first = serve_models.make("llama", tmp_path / "llama", keep=True)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert serve_models.make("llama", tmp_path / "llama", keep=True) == first
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}


def test_without_a_twin_nothing_passes(monkeypatch, tmp_path):
    labels = ("bf16", "mxfp4", "mxfp4, Marlin", "modelopt", "cast on load")
    rows = run(monkeypatch, tmp_path, dict.fromkeys(labels, (served(0), "")) | {"bf16": (None, "no memory")})
    assert all("error" in row for row in rows.values())


def test_a_process_that_fails_or_hangs_says_so(monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text(
        "import time\ntime.sleep(float(open(__file__.replace('vllm.py', 'wait')).read()))"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "wait").write_text("0")
    found, text = serve.apart(tmp_path / "model", "a label", {}, tmp_path, seconds=60, rates=False)
    assert found is None and "exit status 1" in text and "ImportError: cannot import name 'LLM'" in text
    (tmp_path / "wait").write_text("60")
    assert "no end after 5 s" in serve.apart(tmp_path / "model", "a label", {}, tmp_path, seconds=5, rates=True)[1]


def test_a_model_that_cannot_be_made_is_a_row(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(serve, "make", fail)
    (row,) = serve.measure("llama", arguments(), tmp_path)
    assert row["error"] == "OSError: the disk is full"
    json.dumps(row)
