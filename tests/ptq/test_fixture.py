"""The trained fixture: a small gpt-oss model that openai's layout, transformers and this project agree on."""

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import fp4cast

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gpt-oss-tiny"
WINDOW = 128  # what it was trained on
BOUND = 22.0  # measured: 21.57; the same text by its own token frequencies alone: 297.5


@pytest.fixture(scope="module")
def loaded():
    """(model in BF16, what transformers says about the loading)."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        FIXTURE,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    return model.eval(), report


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FIXTURE)


def text(name):
    return (FIXTURE / name).read_text(encoding="utf-8")


def test_it_is_small():
    assert sum(path.stat().st_size for path in FIXTURE.rglob("*")) <= 3e6


def test_inspect_knows_it_and_casts_it_exactly():
    found = fp4cast.inspect(FIXTURE)
    assert found.family == "gpt-oss" and found.exact
    projections = ("gate_up_proj", "down_proj")
    names = {f"model.layers.{i}.mlp.experts.{projection}" for i in range(4) for projection in projections}
    assert {domain.name for domain in found.domains} == names
    assert all(domain.exact for domain in found.domains)


def test_transformers_loads_every_tensor_and_misses_none(loaded):
    model, report = loaded
    assert type(model).__name__ == "GptOssForCausalLM"
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


@pytest.mark.parametrize("name", ["heldout.txt", "calibration.txt"])
def test_the_tokenizer_gives_texts_back(tokenizer, name):
    ids = tokenizer(text(name))["input_ids"]
    assert tokenizer.decode(ids) == text(name)
    assert len(ids) < len(text(name)) / 2
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


@torch.no_grad()
def test_it_has_learned_to_predict_text(loaded, tokenizer):
    tokens = tokenizer(text("heldout.txt"), return_tensors="pt")["input_ids"][0]
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    perplexity = math.exp(loaded[0](windows, labels=windows).loss)
    counts = tokens.bincount().double()
    unigram = math.exp(torch.special.entr(counts / counts.sum()).sum())  # of the text's own frequencies
    assert perplexity < BOUND
    assert perplexity < unigram / 10
