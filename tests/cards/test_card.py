"""The card: frozen for one conversion, true in its figures, and quiet about what strangers write into names."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt

import fp4cast
from fp4cast.cards.metadata import front_matter
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.conversion import job_array
from fp4cast.errors import UsageError
from fp4cast.families.recognise import FAMILIES, read_source
from fp4cast.families.served import command_of
from fp4cast.families.services import SERVICES
from fp4cast.verification.files import verify_files
from helpers import VARIANTS, call, edit, lossy, tree

GOLDEN = Path(__file__).parent / "golden"
COMMIT = "6cee5e81ee83917806bbde320786a8fb61efebee"
SOURCE_CARD = """---
license: apache-2.0
pipeline_tag: text-generation
library_name: vllm
language: [en, zh]
tags: [mxfp4]
---
# The source
"""


def html(card):
    """A card as the Hub's kind of Markdown shows it; raw HTML stays raw, so that it is seen."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card)


def convert(source, destination, **options):
    report = fp4cast.convert(source, destination, **options)
    return report, (destination / "README.md").read_text()


@pytest.fixture
def source(miniatures, tmp_path):
    """A mixture of experts with a card."""
    path = Path(shutil.copytree(miniatures["moe"], tmp_path / "src"))
    (path / "README.md").write_text(SOURCE_CARD)
    return path


def test_one_card_is_frozen(source, tmp_path):
    """To decide that it changes: put the files that the message names into tests/cards/golden, and look at them."""
    convert(source, tmp_path / "dst", source_id=f"acme/Tiny-MoE@{COMMIT}")
    for name in ("README.md", "README.svg"):
        found = (tmp_path / "dst" / name).read_text().replace(f"`{fp4cast.__version__}`", "`VERSION`")
        assert found == (GOLDEN / name).read_text(), tmp_path / "dst" / name


def test_a_quantized_kv_cache_is_in_the_command_and_the_limits(miniatures, tmp_path):
    _, text = convert(miniatures["dense"], tmp_path / "dst", kv_cache_qformat="fp8_cast")
    assert "fp4cast convert SRC MODEL-NVFP4 --kv-cache-qformat fp8_cast\n" in text
    assert "- KV cache in FP8, with scales of 1: engines round it while they serve." in text
    assert "KV cache" not in convert(miniatures["dense"], tmp_path / "plain")[1]


@pytest.mark.parametrize(("kind", "layout", "activations"), VARIANTS)
def test_every_card_says_what_was_measured(miniatures, tmp_path, kind, layout, activations):
    options = {"layout": layout, "activations": activations, "input_scales": 1.0 if activations == "w4a4" else None}
    report, text = convert(miniatures[kind], tmp_path / "dst", source_id="org/name", **options)
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "org/name"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "other" and data["license_link"] == "LICENSE"
    assert {"nvfp4", "fp4cast", layout, activations, report.family} <= set(data["tags"])
    assert f"| MXFP4 tensors cast | {report.tensors['cast']:,}, of which {report.tensors['exact']:,} exactly |" in text
    for count in report.half_blocks.values():
        assert re.search(rf"^\| half-blocks .* \| {count:,}(, exact too)? \|$", text, re.MULTILINE)
    opened = read_source(open_checkpoint(miniatures[kind]))
    counts = [
        int(each.replace(",", ""))
        for each in re.findall(r"^\| `.*` \| ([\d,]+) \| .* \| .* [GM]B \|$", text, re.MULTILINE)
    ]
    counts += [int(each) for each in re.findall(r"^\| \d+ smaller kinds \| (\d+) \|", text, re.MULTILINE)]
    total = len(opened.checkpoint.tensors)
    assert sum(counts) == total - report.tensors["cast"]  # of a pair, one tensor has a line
    assert ("round activations" in text) == (activations == "w4a4")
    assert "<" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert html(text).count("<table>") >= 4
    assert report.card == str(tmp_path / "dst" / "README.md")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_card_serves_as_the_pages_do(miniatures, tmp_path, variant):
    """The rows of docs/engines.md, and of these the ones that are about such a model."""
    kind, layout, activations = variant
    scales = 1.0 if activations == "w4a4" else None
    report, text = convert(
        miniatures[kind], tmp_path / "dst", layout=layout, activations=activations, input_scales=scales
    )
    wrong = "experts" if kind.startswith(("dense", "quark")) else "dense"
    family = next(each.served_as for each in FAMILIES if each.name == report.family)
    rows = [
        row
        for row in SERVICES
        if (row.family, row.layout) == (family, layout) and activations in row.activations and row.models != wrong
    ]
    shown = [command_of(row, "MODEL-NVFP4") for row in rows if row.verdict in ("serves", "loads", "should")]
    serving = text.partition("## Serve it")[2].partition("\n## ")[0]
    commands = [line for block in re.findall(r"```sh\n(.*?)\n```", serving, re.DOTALL) for line in block.splitlines()]
    assert bool(commands) == any(shown)
    assert set(commands) <= set(shown)
    assert {command.split()[0] for command in commands} == {each.split()[0] for each in shown if each}
    for row in rows:
        assert (f"- **Not** {row.release}: " in text) == (row.verdict == "fails") or row.verdict != "fails"


@pytest.mark.parametrize("as_id", [True, False])
def test_the_source_is_named_where_its_place_says_it(source, tmp_path, as_id):
    """In the Hub's cache, by a model id, offline, or by the path; its files link to blobs."""
    snapshot = tmp_path / "hub" / "models--acme--Tiny-MoE" / "snapshots" / COMMIT
    blobs, refs = snapshot.parents[1] / "blobs", snapshot.parents[1] / "refs"
    for folder in (snapshot, blobs, refs):
        folder.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    for i, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        shutil.copy2(path, blobs / str(i))
        (snapshot / path.relative_to(source)).parent.mkdir(exist_ok=True)
        (snapshot / path.relative_to(source)).symlink_to(blobs / str(i))
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    named = "acme/Tiny-MoE@main" if as_id else str(snapshot)
    command = [sys.executable, "-m", "fp4cast", "convert", named, str(tmp_path / "dst"), "--json"]
    subprocess.run(command, check=True, capture_output=True, env=env, cwd=tmp_path)
    convert(source, tmp_path / "said", source_id=f"acme/Tiny-MoE@{COMMIT}")
    assert tree(tmp_path / "dst") == tree(tmp_path / "said")
    said = json.loads((tmp_path / "dst" / "fp4cast.json").read_text())["source"]
    assert said == {"id": "acme/Tiny-MoE", "revision": COMMIT}


def test_nothing_is_guessed_about_a_folder(source, tmp_path):
    (source / "README.md").unlink()
    (source / "LICENSE").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": "someone/else"}))
    _, text = convert(source, tmp_path / "secret-name")
    data = ModelCard(text).data.to_dict()
    assert not data.keys() & {"base_model", "base_model_relation", "license", "license_link", "language"}
    assert "\n# `qwen3_moe` in NVFP4\n" in text
    assert "Licence: not known" in text and "revision | not known" in text
    assert "someone/else" not in text and "secret-name" not in text and str(tmp_path) not in text
    assert "source" not in json.loads((tmp_path / "secret-name" / "fp4cast.json").read_text())


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("base_model: a/b\nbase_model_relation: quantized", "a/b"),
        ("base_model: [a/b, c/d]\nbase_model_relation: quantized", ["a/b", "c/d"]),
        ("base_model: a/b\nbase_model_relation: finetune", None),
        ("base_model: a/b", None),
        ("base_model: 'a/b](x)'\nbase_model_relation: quantized", None),
    ],
)
def test_the_base_of_a_quantized_source_is_a_base_too(source, tmp_path, metadata, expected):
    (source / "README.md").write_text(f"---\n{metadata}\n---\n")
    data = ModelCard(convert(source, tmp_path / "dst")[1]).data
    assert data.get("base_model") == expected
    assert (data.get("base_model_relation") == "quantized") == (expected is not None)


@pytest.mark.parametrize("said", ["x", "a/b/c", "/models/x", "a/b@c d", "a--b/c", "-a/b", "a/b\n- x", "http://x.y/z"])
def test_a_source_id_that_is_none_is_wrong_usage(miniatures, tmp_path, said):
    result = call("convert", miniatures["moe"], tmp_path / "dst", "--source-id", said)
    assert (result.exit_code, "--source-id: expected ORG/NAME" in result.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_what_was_rounded_is_said(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    report, text = convert(source, tmp_path / "dst", inexact="nearest")
    (tensor,) = report.inexact
    assert f"| `{tensor.name}` | {tensor.rounded_half_blocks} |" in text
    assert f"| {tensor.snr_db:.1f} dB |" in text
    assert "bit for bit" in text and "**Every weight has" not in text
    assert "--inexact nearest" in text
    picture = (tmp_path / "dst" / "README.svg").read_text()
    assert "some weights rounded" in picture


# --- whose files they are ---------------------------------------------------------------------------------------------


def test_the_sources_cards_lie_beside_the_new_one(source, tmp_path):
    cards = {"README.md": SOURCE_CARD, "README.svg": "<svg/>", "README.source.md": "older", "docs/README.md": "docs"}
    (source / "docs").mkdir()
    for name, text in cards.items():
        (source / name).write_text(text)
    _, text = convert(source, tmp_path / "dst")
    found = {
        name: (tmp_path / "dst" / name).read_text()
        for name in ("README.source.md", "README.source.svg", "README.source.source.md", "docs/README.md")
    }
    assert list(found.values()) == list(cards.values())
    assert "[README.source.md](README.source.md)" in text
    assert fp4cast.verify(source, tmp_path / "dst", strict=True).ok
    assert verify_files(tmp_path / "dst", strict=True).ok


def test_without_a_card_the_sources_stays(source, tmp_path):
    report = fp4cast.convert(source, tmp_path / "dst", card=False)
    assert (tmp_path / "dst" / "README.md").read_text() == SOURCE_CARD
    assert not list((tmp_path / "dst").glob("README.s*"))
    assert fp4cast.verify(source, tmp_path / "dst", strict=True).ok
    assert report.card is None
    again = call("convert", source, tmp_path / "again", "--no-card")
    assert again.exit_code == 0 and tree(tmp_path / "again") == tree(tmp_path / "dst")


def test_a_date_is_the_one_that_is_said(source, tmp_path, monkeypatch):
    """The bytes depend on no clock: tests/attacks/test_neighbours.py."""
    _, text = convert(source, tmp_path / "none")
    assert "| date |" not in text
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1764028799")
    _, dated = convert(source, tmp_path / "dst")
    assert dated.replace("| date | 2025-11-24 |\n", "") == text != dated
    for wrong in ("today", "1e9", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH: expected seconds"):
            fp4cast.convert(source, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_card_is_written_once_and_the_same_again(source, tmp_path):
    options = {"source_id": "acme/Tiny-MoE"}
    convert(source, tmp_path / "dst", **options)
    before = tree(tmp_path / "dst")
    assert "complete already" in fp4cast.convert(source, tmp_path / "dst", **options).notes[-1]
    fp4cast.convert(source, tmp_path / "dst", overwrite=True, restart=True, **options)
    assert tree(tmp_path / "dst") == before


def test_a_job_array_writes_one_card_at_the_end(source, tmp_path):
    convert(source, tmp_path / "whole", source_id="acme/Tiny-MoE")
    for part in (1, 2):
        job_array.convert_part(source, tmp_path / "dst", part, 2)
        assert not list(tmp_path.glob(".dst.fp4cast/**/README*"))
    report = job_array.finish(source, tmp_path / "dst", job_array.ConvertOptions(source_id="acme/Tiny-MoE"))
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")
    assert report.card == str(tmp_path / "dst" / "README.md")


def test_an_edited_card_is_not_overwritten_and_a_deleted_one_is_no_obstacle(source, tmp_path):
    convert(source, tmp_path / "dst")
    (tmp_path / "dst" / "README.md").write_text("mine")
    with pytest.raises(fp4cast.Fp4CastError, match=r"changed since fp4cast wrote them: README\.md"):
        fp4cast.convert(source, tmp_path / "dst", overwrite=True, restart=True)
    for path in (tmp_path / "dst").glob("README*"):
        path.unlink()
    assert fp4cast.convert(source, tmp_path / "dst").card is None  # complete, and compared
    fp4cast.convert(source, tmp_path / "dst", overwrite=True, restart=True)
    assert (tmp_path / "dst" / "README.md").exists()


def test_people_and_scripts_are_told_where_it_is(source, tmp_path):
    said = call("convert", source, tmp_path / "dst")
    assert f"{tmp_path / 'dst' / 'README.md'}" in said.stdout.replace("\n", "")
    document = json.loads(call("convert", source, tmp_path / "dst", "--json").stdout)
    assert document["card"] == str(tmp_path / "dst" / "README.md")
    assert json.loads(call("verify", source, tmp_path / "dst", "--json").stdout)["card"] is None


# --- what strangers write ---------------------------------------------------------------------------------------------

EVIL = "x`|</td><script>alert(1)</script>\n\n---\nlicense: evil\n[a](javascript:b)![c](//d)&lt;\x1b[31m\u202e"


def test_names_of_tensors_are_no_markup(source, tmp_path):
    path = source / "model-00001-of-00002.safetensors"
    rename(path, source, "model.layers.0.input_layernorm.weight", EVIL)
    _, text = convert(source, tmp_path / "dst")
    assert set(re.findall(r"<(\w+)", html(text))) == set(
        re.findall(r"<(\w+)", html((GOLDEN / "README.md").read_text()))
    )
    assert not re.search(r"script|javascript:b\)|\x1b|\u202e", re.sub(r"`[^`\n]*`", "", text))
    assert set(ModelCard(text).data.to_dict()) <= set(ModelCard((GOLDEN / "README.md").read_text()).data.to_dict())
    assert ModelCard(text).data.license == "apache-2.0"


def rename(path, source, old, new):
    """Call a tensor of a shard something else, in the index too."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[new] = header.pop(old)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][new] = index["weight_map"].pop(old)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


EVIL_CARD = """---
license: "mit\\n---\\n<script>"
license_name: "<img src=x>"
license_link: "javascript:alert(1)"
pipeline_tag: "text-generation\\nlicense: evil"
library_name: [1, {a: b}]
language: ["en", "<b>", 7]
base_model: ["a/b", "<script>/x", "c/d)"]
base_model_relation: quantized
datasets: [secret/data]
---
"""


def test_metadata_of_the_source_are_taken_by_the_letter_or_not_at_all(source, tmp_path):
    (source / "README.md").write_text(EVIL_CARD)
    _, text = convert(source, tmp_path / "dst")
    data = ModelCard(text).data.to_dict()
    assert {key: data.get(key) for key in data if key != "tags"} == {
        "license": "other",
        "license_link": "LICENSE",
        "base_model": "a/b",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["en"],
    }
    assert not re.search("script|img|evil|secret", text)


def test_a_bad_scale_does_not_reach_the_card(source, tmp_path):
    """Nothing is published, so that no card claims anything."""
    name = "model.layers.0.mlp.experts.0.down_proj.weight_scale"
    edit(source, name, lambda data: data.__setitem__(0, 255))
    with pytest.raises(fp4cast.Fp4CastError):
        fp4cast.convert(source, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_metadata_are_spelled_as_huggingface_hub_spells_them():
    odd = ["no", "1e3", "a: b", "ä", "👀", "#x", "'", '"', "", " y ", "- z", "x" * 200, "2026-11-25", "a\tb"]
    values = {"license": "apache-2.0", "tags": odd, "base_model": "acme/tiny", "library_name": "no", "language": ["no"]}
    expected = ModelCardData(**values).to_yaml(original_order=list(values))
    assert front_matter(values) == f"---\n{expected}\n---\n"
