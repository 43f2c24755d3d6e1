"""`--dry-run` of every command that writes: it says what the command then does, and writes nothing."""

import json
import shutil

import pytest
import typer

from fp4cast.cli.app import app
from helpers import call, edit, interrupted, lossy, options, tree

COMMANDS = typer.main.get_command(app).commands
LOOKING = {"inspect", "verify", "env"}


def arguments(kind):
    w4a4 = "activations" in options(kind)
    return ["--activations", "w4a4", "--input-scales", "1.0"] if w4a4 else []


def dry(root, *words, code=0):
    """The document of a dry run that has left everything as it was."""
    before = tree(root), sorted(path for path in root.rglob("*"))
    done = call(*words, "--dry-run", "--json")
    assert done.exit_code == code, done.stderr
    people = call(*words, "--dry-run")
    assert people.exit_code == code
    assert (tree(root), sorted(path for path in root.rglob("*"))) == before
    document = json.loads(done.stdout)
    if not code:
        assert "nothing was written" in people.stdout and document["dry_run"] is True
    return document


def sizes(destination):
    return {name: (destination / name).stat().st_size for name in tree(destination)}


def same(document, destination):
    """The files that were foretold are those that are there, where a size was foretold with that size."""
    real = sizes(destination)
    assert document["files"].keys() == real.keys()
    assert all(size is None or size == real[name] for name, size in document["files"].items())
    assert document["bytes"] == sum(size or 0 for size in document["files"].values())


def test_every_command_that_writes_has_it():
    have = {name for name, command in COMMANDS.items() if "--dry-run" in {o for p in command.params for o in p.opts}}
    assert have == COMMANDS.keys() - LOOKING


@pytest.mark.parametrize("kind", ["gpt-oss", "deepseek-v4", "dense"])
@pytest.mark.parametrize("more", [[], ["--no-card"]], ids=["card", "no card"])
def test_convert(miniatures, tmp_path, kind, more):
    words = ["convert", miniatures[kind], tmp_path / "dst", *arguments(kind), *more]
    document = dry(tmp_path, *words)
    done = json.loads(call(*words, "--json").stdout)
    same(document, tmp_path / "dst")
    unknown = {name for name, size in document["files"].items() if size is None}
    assert unknown == ({"fp4cast.json"} if more else {"fp4cast.json", "README.md", "README.svg"})
    assert document["exact"] is done["exact"] is True
    for key in ("cast", "copied"):
        assert document["tensors"][key] == done["tensors"][key]
    assert document["left_out"] == done["left_out"]
    again = dry(tmp_path, *words)
    assert again["files"] == {} and "complete already" in again["notes"][0]


def test_the_way_back(converted, tmp_path):
    words = ["convert", converted["gpt-oss"], tmp_path / "dst", "--to", "mxfp4"]
    document = dry(tmp_path, *words)
    done = json.loads(call(*words, "--json").stdout)
    same(document, tmp_path / "dst")
    assert (document["layout"], document["exact"]) == (done["layout"], done["exact"]) == ("mxfp4", True)


def test_convert_that_is_not_exact(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    refused = dry(tmp_path, "convert", source, tmp_path / "dst", code=1)
    assert refused["error"]["type"] == "InexactError"
    allowed = dry(tmp_path, "convert", source, tmp_path / "dst", "--inexact", "nearest")
    assert allowed["exact"] is False and allowed["scale_domains"]["all"] - allowed["scale_domains"]["exact"] == 1


def test_convert_goes_on_as_it_will(miniatures, tmp_path):
    source, destination = miniatures["gpt-oss"], tmp_path / "dst"
    whole = dry(tmp_path, "convert", source, destination)["files"]
    interrupted(source, destination, 0.9)
    document = dry(tmp_path, "convert", source, destination)
    assert document["notes"] == ["shards that an earlier run has finished, and that would be kept: 1"]
    assert len(document["files"]) == len(whole) - 1
    assert dry(tmp_path, "convert", source, destination, "--restart")["files"] == whole
    other = dry(tmp_path, "convert", source, destination, "--layout", "compressed-tensors", code=call(
        "convert", source, destination, "--layout", "compressed-tensors").exit_code)  # fmt: skip
    assert "error" in other
    assert "are not finished" in dry(tmp_path, "convert", source, destination, "--finish", code=1)["error"]["message"]


def test_a_part_writes_its_shards_alone(miniatures, tmp_path):
    source, destination = miniatures["gpt-oss"], tmp_path / "dst"
    parts = [dry(tmp_path, "convert", source, destination, "--shards", f"{i}/2")["files"] for i in (1, 2)]
    done = [json.loads(call("convert", source, destination, "--shards", f"{i}/2", "--json").stdout) for i in (1, 2)]
    assert [list(files) for files in parts] == [part["shards"] for part in done]
    assert [sum(files.values()) for files in parts] == [part["bytes"] for part in done]
    finish = dry(tmp_path, "convert", source, destination, "--finish")["files"]
    assert not [name for name in finish if name.endswith(".safetensors")]
    assert call("convert", source, destination, "--finish").exit_code == 0
    assert finish.keys() | parts[0].keys() | parts[1].keys() == tree(destination).keys()


def test_what_would_be_refused_is_refused(miniatures, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").write_text("x")
    assert "mine" in dry(tmp_path, "convert", miniatures["dense"], tmp_path / "dst", code=1)["error"]["message"]
    missing = dry(tmp_path, "convert", "nobody/has-this", tmp_path / "new", code=1)["error"]
    assert missing["type"] == "CheckpointError" and "nothing is downloaded" in missing["message"]
    taken = shutil.copytree(miniatures["dense"], tmp_path / "src")
    call("convert", taken, tmp_path / "made")
    edit(taken, "model.layers.0.mlp.down_proj.weight_scale", lambda data: data.__iadd__(1))
    assert "--overwrite" in dry(tmp_path, "convert", taken, tmp_path / "made", code=1)["error"]["message"]
    assert dry(tmp_path, "convert", taken, tmp_path / "made", "--overwrite")["files"]


def test_card(miniatures, tmp_path):
    source = shutil.copytree(miniatures["dense"], tmp_path / "src")
    (source / "README.md").write_text("---\nlicense: mit\n---\nThe source.\n")
    call("convert", source, tmp_path / "dst", "--no-card")
    document = dry(tmp_path, "card", source, tmp_path / "dst", "--overwrite")
    assert call("card", source, tmp_path / "dst", "--overwrite").exit_code == 0
    real = sizes(tmp_path / "dst")
    assert document["files"] == {name: real[name] for name in ("README.source.md", "README.md", "README.svg")} | {
        "fp4cast.json": None
    }


def test_demo_and_study(tmp_path):
    document = dry(tmp_path, "demo", "--out", tmp_path / "kept")
    assert call("demo", "--out", tmp_path / "kept").exit_code == 0
    assert {name.rstrip("/") for name in document["files"]} == {path.name for path in (tmp_path / "kept").iterdir()}
    dry(tmp_path, "demo", "--out", tmp_path / "kept", code=1)
    assert "temporary" in call("demo", "--dry-run").stdout
    assert dry(tmp_path, "study")["files"] == {}


@pytest.mark.oracle
def test_study_foretells_its_files(tmp_path):
    files = dry(tmp_path, "study", "--out", tmp_path / "page")["files"]
    assert "index.html" in files and "study.json" in files and len(files) > 4
    (tmp_path / "file").touch()
    dry(tmp_path, "study", "--out", tmp_path / "file", code=1)


@pytest.mark.oracle
def test_commands_that_run_a_model(tmp_path, pytestconfig):
    tiny = pytestconfig.rootpath / "tests" / "fixtures" / "gpt-oss-tiny"
    text = ["--dataset", tiny / "calibration.txt", "--calib-size", "2", "--calib-seq", "16"]
    words = ["calibrate", tiny, "--out", tmp_path / "amax.json", *text]
    document = dry(tmp_path, *words)
    assert document["files"] == {"amax.json": None}
    done = json.loads(call(*words, "--json").stdout)
    assert done["modules"] == document["modules"]
    assert dry(tmp_path, *words, code=1)["error"]["type"] == "DestinationError"
    words = ["ptq", "--pyt_ckpt_path", tiny, "--qformat", "nvfp4_mlp_only", "--export_path", tmp_path / "dst", *text]
    for cast in (["--cast_mxfp4_to_nvfp4"], []):
        document = dry(tmp_path, *words, *cast)
        done = json.loads(call(*words, *cast, "--json").stdout)
        same(document, tmp_path / "dst")
        assert document.get("exact", False) is done["exact"] is bool(cast)
        dry(tmp_path, *words, *cast, code=1)
        shutil.rmtree(tmp_path / "dst")
