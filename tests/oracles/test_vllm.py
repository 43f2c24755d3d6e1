"""vLLM's own loader builds the models and holds exactly the values of the files, fused projections included."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.families.recognise import read_source

PYTHON = os.environ.get("FP4CAST_VLLM")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: run ./dev vllm"),
]
VARIANTS = [
    (k, lo, a) for k in ("dense", "moe") for lo in ("modelopt", "compressed-tensors") for a in ("w4a16", "w4a4")
]


def test_vllm_loads_every_variant_exactly_and_runs_the_dense_ones(miniatures, tmp_path):
    for kind, layout, activations in VARIANTS:
        modules = read_source(open_checkpoint(miniatures[kind])).pairs
        amax = {module: 1000.0 + 7 * i for i, module in enumerate(modules)}  # no two alike, none a power of two
        fp4cast.convert(
            miniatures[kind],
            tmp_path / f"{kind}-{layout}-{activations}",
            layout=layout,
            activations=activations,
            input_scales=amax if activations == "w4a4" else None,
        )
    checkpoints = sorted(tmp_path.iterdir())
    script = Path(__file__).parent / "vllm_loader.py"
    done = subprocess.run([PYTHON, script, "--generate", *checkpoints], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for kind, projections in (("dense", 14), ("moe", 24)):
        assert done.stdout.count(f"{projections} projections equal, 0 differ") == 4, (kind, done.stdout)
    assert done.stdout.count("generated [") == 4


def test_the_check_itself_can_fail(miniatures, tmp_path):
    """A layer that the config forgets is seen: the loader's check is no rubber stamp."""
    fp4cast.convert(miniatures["moe"], tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    config["quantization_config"]["quantized_layers"].pop("model.layers.1.mlp.experts")
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    script = Path(__file__).parent / "vllm_loader.py"
    done = subprocess.run([PYTHON, script, tmp_path / "moe"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
