"""The same situation has the same exit status in every command: the table of docs/usage.md."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.cli.app import app
from fp4cast.extras import install_line
from helpers import call, flip, lossy

COMMANDS = typer.main.get_command(app).commands
ROOT = Path(__file__).parents[2]
WITH_SOURCE = ("inspect", "convert", "verify", "card", "calibrate", "ptq")


def command(name, source, tmp_path, destination=None):
    """A command line that would work, were the source a checkpoint."""
    text = tmp_path / "text.txt"
    text.write_text("some words to run a model on")
    made = destination or tmp_path / "made"
    return {
        "inspect": ["inspect", source],
        "convert": ["convert", source, tmp_path / "new"],
        "verify": ["verify", source, made],
        "card": ["card", source, made],
        "calibrate": ["calibrate", source, "--out", tmp_path / "amax.json", "--dataset", text],
        "ptq": ["ptq", "--model", source, "--export-path", tmp_path / "new", "--qformat", "w4a16_nvfp4"],
    }[name]


def status(*words):
    """The exit status, the same with and without `--json`, where there is an error's document."""
    done, people = call(*words, "--json"), call(*words)
    assert done.exit_code == people.exit_code and people.stderr.count("error: ") <= 1
    assert "Traceback" not in people.stderr
    return done.exit_code


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage(name, miniatures, tmp_path):
    assert status(name, "--no-such-option") == 2
    assert status(name, "too", "many", "words", "for", "it") == 2
    words = command(name, miniatures["dense"], tmp_path) if name in WITH_SOURCE else [name]
    assert status(*words, "--quiet", "--verbose") == 2


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_a_path_that_is_not_there(name, tmp_path):
    assert status(*command(name, tmp_path / "nothing", tmp_path)) == 1


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_no_checkpoint(name, tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "notes.txt").write_text("x")
    assert status(*command(name, tmp_path / "src", tmp_path)) == 1


def test_not_exact(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    assert status(*command("convert", source, tmp_path)) == 1
    assert status(*command("convert", source, tmp_path), "--dry-run") == 1
    assert status(*command("inspect", source, tmp_path)) == 0, "an answer, not a failure"
    assert call(*command("convert", source, tmp_path), "--inexact", "nearest").exit_code == 0


@pytest.mark.parametrize("name", ["verify", "card"])
def test_a_failed_verification(name, miniatures, converted, tmp_path):
    destination = shutil.copytree(converted["dense"], tmp_path / "dst")
    flip(next(each for each in open_checkpoint(destination).tensors.values() if each.dtype == "U8"), 0)
    assert status(*command(name, miniatures["dense"], tmp_path, destination)) == 1
    assert status("verify", destination) == 1


@pytest.mark.parametrize("name", ["convert", "calibrate", "demo", "study"])
def test_an_output_that_is_in_the_way(name, miniatures, tmp_path):
    if name == "study":
        pytest.importorskip("matplotlib")
    (tmp_path / "new").write_text("a file")
    (tmp_path / "amax.json").write_text("{}")
    words = (
        command(name, miniatures["dense"], tmp_path)
        if name in WITH_SOURCE
        else [name, "--out", tmp_path / "new", *["--quick"] * (name == "study")]
    )
    assert status(*words) == 1
    assert (tmp_path / "new").read_text() == "a file"


@pytest.mark.parametrize(("name", "missing"), [("calibrate", "torch"), ("ptq", "torch"), ("study", "matplotlib")])
def test_a_missing_extra(name, missing, miniatures, tmp_path):
    words = command(name, miniatures["dense"], tmp_path) if name in WITH_SOURCE else [name, "--out", tmp_path / "page"]
    script = f"import sys; sys.modules[{missing!r}] = None; from fp4cast.cli import main; main()"
    line = [sys.executable, "-c", script, *map(str, words), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "MissingExtraError"
    line = install_line("ptq" if missing == "torch" else "study")
    assert line in error["message"] and error["message"] in done.stderr


def test_a_disk_without_space(miniatures, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    words = command("convert", miniatures["dense"], tmp_path)
    assert status(*words) == 1
    assert status(*words, "--dry-run") == 1
    assert "are free" in call(*words).stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_log_that_cannot_be_written(name, miniatures, tmp_path):
    words = command(name, miniatures["dense"], tmp_path) if name in WITH_SOURCE else [name]
    words += ["dst", "org/name"] * (name == "push")
    assert status(*words, "--log", tmp_path / "no" / "log") == 1
