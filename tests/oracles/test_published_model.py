"""A trained transformer that a package ships: MXFP4 by compressed-tensors, read by transformers, cast by fp4cast."""

import importlib.util

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the oracles need torch: ./dev test installs them")
pytest.importorskip("compressed_tensors")

import published_model as example
from transformers import AutoModelForMaskedLM

import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("rxnmapper") is None, reason="pip install --no-deps rxnmapper"),
]
LAYOUTS = ("modelopt", "compressed-tensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The source, and what it became in each layout."""
    root = tmp_path_factory.mktemp("published")
    original = AutoModelForMaskedLM.from_pretrained(example.published(), dtype=torch.bfloat16)
    example.quantize(original, root / "source")
    for layout in LAYOUTS:
        fp4cast.convert(root / "source", root / layout, layout=layout)
    return root


@pytest.fixture(scope="module")
def riddles():
    return example.masked(example.published() / "vocab.txt")


def right(logits, at, expected):
    return int((logits[torch.arange(len(at)), at].argmax(-1) == expected).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_those_of_the_source_bit_for_bit(made, riddles, layout):
    ids, at, expected = riddles
    source, cast = (example.answers(made / name, ids) for name in ("source", layout))
    assert torch.equal(source.view(torch.int16), cast.view(torch.int16))
    # It is the trained model, still: guessing would give less than one of the 99.
    assert len(at) == 99 and right(cast, at, expected) >= 85


def test_the_model_was_quantized(made, riddles):
    ids, at, expected = riddles
    published, source = (example.answers(path, ids) for path in (example.published(), made / "source"))
    assert not torch.equal(published, source) and right(published, at, expected) >= 85
    tensors = open_checkpoint(made / "source").tensors
    packed = [name for name in tensors if name.endswith(".weight_packed")]
    assert len(packed) == 8 and not [name for name in tensors if name.endswith(("query.weight", "ffn.weight"))]


def test_one_bit_would_show(made, riddles, tmp_path):
    """The least bit of one code that is not zero, in one of 12 layers' shared weights."""
    ids, _, _ = riddles
    tensor = open_checkpoint(made / "modelopt").tensors[
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"
    ]
    content = bytearray((made / "modelopt" / tensor.path.name).read_bytes())
    at = tensor.start + int(np.flatnonzero(np.frombuffer(content[tensor.start :][: tensor.nbytes], np.uint8) & 6)[0])
    content[at] ^= 1
    (tmp_path / tensor.path.name).write_bytes(content)
    (tmp_path / "config.json").write_bytes((made / "modelopt" / "config.json").read_bytes())
    before, after = (example.answers(path, ids) for path in (made / "modelopt", tmp_path))
    assert not torch.equal(before, after)
    report = fp4cast.verify(made / "source", made / "modelopt")
    assert report.ok and report.exact and report.tensors["cast"] == 8
