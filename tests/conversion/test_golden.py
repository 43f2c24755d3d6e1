"""The bytes that every miniature becomes, frozen: a change of the output is a decision, never an accident.

To decide: `PYTHONPATH=tests python tests/conversion/test_golden.py` prints the new table; put it into tests/golden.json
by hand and say why in the changelog.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

import attention
import fp4cast
from fp4cast import miniatures as mini
from helpers import VARIANTS, tree

GOLDEN = Path(__file__).parents[1] / "golden.json"


def digests(source, layout, activations, destination, **options):
    scales = 0.5 if activations == "w4a4" else None
    fp4cast.convert(source, destination, layout=layout, activations=activations, input_scales=scales, **options)
    return {name: digest for name, digest in tree(destination).items() if name.endswith(("tensors", "index.json"))}


@pytest.mark.parametrize(("kind", "layout", "activations"), VARIANTS)
def test_every_byte_is_as_it_was(miniatures, tmp_path, kind, layout, activations):
    golden = json.loads(GOLDEN.read_text())
    found = digests(miniatures[kind], layout, activations, tmp_path / "dst")
    assert found == golden[f"{kind} {layout} {activations}"]


def test_every_byte_of_attention_in_fp8_is_as_it_was(tmp_path):
    found = digests(attention.kimi_k3(tmp_path / "src"), "modelopt", "w4a16", tmp_path / "dst", fp8="attention")
    assert found == json.loads(GOLDEN.read_text())["kimi-k3 modelopt w4a16 fp8"]


@pytest.mark.parametrize("kind", mini.KINDS)
def test_the_miniatures_are_as_they_were(miniatures, kind):
    shards = {name: d for name, d in tree(miniatures[kind]).items() if name.startswith("model-")}
    assert shards == json.loads(GOLDEN.read_text())[f"{kind} source"]


def main():
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in mini.KINDS:
            source = mini.make(kind, Path(scratch) / kind)
            table[f"{kind} source"] = {n: d for n, d in tree(source).items() if n.startswith("model-")}
        for kind, *rest in VARIANTS:
            destination = Path(scratch) / "-".join((kind, *rest))
            table[" ".join((kind, *rest))] = digests(Path(scratch) / kind, *rest, destination)
        source, name = attention.kimi_k3(Path(scratch) / "attention"), "kimi-k3 modelopt w4a16 fp8"
        table[name] = digests(source, "modelopt", "w4a16", Path(scratch) / name, fp8="attention")
    json.dump(table, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main()
