"""A family is one row: added to the table, it is recognised, converted in both layouts, and verified."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.errors import PartnerError, UnsupportedError, UsageError
from fp4cast.families import recognise
from fp4cast.families.family import Family, Suffix
from fp4cast.miniatures.draft import Draft, write_checkpoint

# What `families/example.py` would hold: docs/families.md shows the same.
EXAMPLE = Family(
    name="example",
    title="Example",
    codes=Suffix(".mx_codes", ("I8",)),
    scales=Suffix(".mx_exponents", ("U8",)),
    casts=r"\.experts\.",
    keeps=r"^draft\.",
    layouts=("modelopt", "compressed-tensors"),
    aliases=((r"^backbone\.", "model."),),
    bias=lambda config: int(config.get("exponent_bias", 127)),
)
BIAS = 120
ROOT = Path(__file__).parents[2]


def draft_example(draft):
    """What `miniatures/example.py` would hold: its names, dtypes, traps, and a pair in two shards."""
    for shard, block in enumerate(("backbone.layers.0", "draft.layers.0")):
        for expert in range(2):
            for leaf, rows, columns in (("gate_proj", 64, 96), ("up_proj", 64, 96), ("down_proj", 96, 64)):
                module = f"{block}.mlp.experts.{expert}.{leaf}"
                codes, scales = draft.mxfp4(module, rows, columns)
                draft.add(shard, f"{module}.mx_codes", "I8", codes.reshape(rows, -1))
                away = expert == 1 and leaf == "up_proj"
                stored = np.clip(scales.astype(int) + BIAS - 127, 0, 254).astype(np.uint8)
                draft.add(shard ^ away, f"{module}.mx_exponents", "U8", stored)
    draft.bf16(0, "backbone.layers.0.mlp.router.weight", 2, 96)
    draft.config = {"architectures": ["Example"], "exponent_bias": BIAS}


@pytest.fixture
def example(tmp_path, monkeypatch):
    monkeypatch.setattr(recognise, "FAMILIES", (EXAMPLE, *recognise.FAMILIES))
    draft = Draft(np.random.default_rng(0), traps=True)
    draft_example(draft)
    files = {f"model-{i + 1:05d}-of-00002.safetensors": tensors for i, tensors in enumerate(draft.files)}
    write_checkpoint(tmp_path / "example", files, draft.config)
    return tmp_path / "example"


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("activations", ["w4a16", "w4a4"])
def test_a_new_family_is_converted_and_verified(example, tmp_path, layout, activations):
    scales = 1.0 if activations == "w4a4" else None
    options = {"layout": layout, "activations": activations, "input_scales": scales}
    if layout == "modelopt":  # its config has no word for the experts that stay MXFP4
        with pytest.raises(UsageError, match=r"draft.*modelopt layout.*use --layout compressed-tensors"):
            fp4cast.convert(example, tmp_path / "refused", **options)
        make_plain(example)
    report = fp4cast.convert(example, tmp_path / "dst", **options)
    assert report.exact
    assert report.family == "example"
    assert report.tensors["cast"] == 6
    assert report.half_blocks["shifted"] > 0
    assert fp4cast.verify(example, tmp_path / "dst").ok
    assert report.served == "no engine that we ran or read"


def test_the_page_that_explains_it_is_true(tmp_path, monkeypatch):
    """The two blocks of docs/families.md, as they stand there."""
    page, names = (ROOT / "docs" / "families.md").read_text(), {}
    for block in re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(block, names)  # noqa: S102
    monkeypatch.setattr(recognise, "FAMILIES", (names["ACME"], *recognise.FAMILIES))
    monkeypatch.setitem(mini.MAKERS, "acme", names["draft_acme"])
    source = mini.make("acme", tmp_path / "acme")
    report = fp4cast.convert(source, tmp_path / "dst")
    assert (report.family, report.exact, report.tensors["cast"]) == ("acme", True, 6)
    assert fp4cast.verify(source, tmp_path / "dst").ok


def make_plain(example):
    """Without the draft model."""
    index = json.loads((example / "model.safetensors.index.json").read_text())
    tensors = {}
    for name, tensor in open_checkpoint(example).tensors.items():
        if not name.startswith("draft."):
            data = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.start)
            width = {"BF16": np.uint16}.get(tensor.dtype, np.uint8)
            tensors[name] = (tensor.dtype, data.view(width).reshape(tensor.shape))
    config = json.loads((example / "config.json").read_text())
    for file in set(index["weight_map"].values()):
        (example / file).unlink()
    for file in ("config.json", "model.safetensors.index.json"):
        (example / file).unlink()
    example.rmdir()
    write_checkpoint(example, {"model-1.safetensors": tensors}, config)


def test_engines_find_its_experts_under_every_name(example, tmp_path):
    make_plain(example)
    fp4cast.convert(example, tmp_path / "dst")
    section = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert sorted(section["quantized_layers"]) == ["backbone.layers.0.mlp.experts", "model.layers.0.mlp.experts"]


def test_its_rows_are_in_errors_and_in_inspect(example):
    info = fp4cast.inspect(example)
    assert (info.title, info.cast, len(info.domains)) == ("Example", 6, 4)
    assert [target.layout.name for target in info.targets] == ["modelopt"] * 2 + ["compressed-tensors"] * 2
    assert info.exact


def test_a_missing_partner_is_named(example):
    path = example / "model.safetensors.index.json"
    tensors = {"backbone.layers.0.mlp.experts.0.up_proj.mx_codes": ("I8", np.zeros((4, 16), np.uint8))}
    for file in example.iterdir():
        file.unlink()
    example.rmdir()
    write_checkpoint(example, {"model-1.safetensors": tensors}, {})
    assert path.exists()
    with pytest.raises(PartnerError, match=r"expected 'backbone\..*mx_exponents'"):
        fp4cast.inspect(example)


def test_without_its_row_the_error_says_what_is_read(example, monkeypatch):
    monkeypatch.setattr(recognise, "FAMILIES", recognise.FAMILIES[1:])
    with pytest.raises(UnsupportedError, match="no MXFP4 weights: the checkpoint is I8"):
        fp4cast.inspect(example)
