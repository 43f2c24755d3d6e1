"""single-expert gpt-oss: cast like any other model, and what transformers then makes of it."""

import json

import numpy as np
import pytest

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from helpers import raw

pytestmark = pytest.mark.filterwarnings("ignore")


def test_biases_travel_and_nothing_is_interleaved(miniatures, converted):
    source, result = (open_checkpoint(each["gpt-oss-experts"]).tensors for each in (miniatures, converted))
    biases = [name for name in source if ".experts." in name and name.endswith(".bias")]
    assert len(biases) == 24
    for name in biases:
        np.testing.assert_array_equal(raw(miniatures["gpt-oss-experts"], name), raw(converted["gpt-oss-experts"], name))
    expert = "model.layers.1.mlp.experts.3"
    assert result[f"{expert}.gate_proj.weight"].path != result[f"{expert}.up_proj.weight"].path
    scales = [raw(converted["gpt-oss-experts"], f"{expert}.{x}_proj.weight_scale_2").tobytes() for x in ("gate", "up")]
    assert scales[0] == scales[1]


@pytest.mark.oracle
def test_transformers_with_fp4cast_hf_refuses_it(converted):
    transformers = pytest.importorskip("transformers", reason="the oracles need it: ./dev test installs them")
    import fp4cast.hf

    with pytest.raises(fp4cast.errors.CheckpointError, match=r"experts\.\d\.\w+\.bias .* has no parameter for it"):
        transformers.AutoModelForCausalLM.from_pretrained(converted["gpt-oss-experts"])


@pytest.mark.oracle
def test_transformers_leaves_the_experts_of_compressed_tensors_at_random(miniatures, tmp_path):
    """If this begins to fail, transformers can load them: then the row in families/services.py is out of date."""
    transformers = pytest.importorskip("transformers", reason="the oracles need it: ./dev test installs them")
    fp4cast.convert(miniatures["gpt-oss-experts"], tmp_path / "dst", layout="compressed-tensors")
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst", output_loading_info=True)
    banks = {f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in ("gate_up_proj", "down_proj")}
    assert banks <= set(info["missing_keys"])
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["model_type"] == "gpt_oss"
