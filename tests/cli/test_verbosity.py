"""`-q`, `-v` and `--log` of every command."""

import json
import logging
import re

import pytest
import typer

from fp4cast.cli.app import app
from helpers import call, interrupted, tree

COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(autouse=True)
def nothing_stays():
    """The logger of the package, which outlives a command in this process."""
    log = logging.getLogger("fp4cast")
    before = log.level, list(log.handlers), log.propagate
    yield
    assert (log.level, log.handlers, log.propagate) == before


def test_every_command_has_them():
    for name, command in COMMANDS.items():
        known = {opt for parameter in command.params for opt in parameter.opts}
        assert {"-q", "--quiet", "-v", "--verbose", "--log"} <= known, name


def test_quiet_says_nothing_but_does_it(miniatures, converted, tmp_path):
    source, destination = miniatures["dense"], tmp_path / "dst"
    for words in (
        ["convert", source, destination, "-q"],
        ["verify", source, destination, "--quiet"],
        ["verify", destination, "-q"],
        ["card", source, destination, "-q"],
        ["inspect", source, "-q"],
        ["demo", "-q"],
        ["env", "-q"],
    ):
        done = call(*words)
        assert (done.exit_code, done.stdout, done.stderr) == (0, "", ""), words
    assert tree(destination) == tree(converted["dense"])
    assert json.loads(call("inspect", source, "-q", "--json").stdout)["exact"] is True, "it was asked for"


def test_quiet_keeps_errors_and_warnings(miniatures, converted, tmp_path):
    wrong = call("inspect", tmp_path / "nothing", "-q")
    assert wrong.exit_code == 1 and "is not a directory" in wrong.stderr and not wrong.stdout
    failed = call("verify", miniatures["moe"], converted["dense"], "-q")
    assert failed.exit_code == 1 and not failed.stdout
    assert re.fullmatch(r"error: .*: differs from .* in \d+ places; the first is .*\n", failed.stderr)
    interrupted(miniatures["gpt-oss"], tmp_path / "dst", 0.9)
    again = call("convert", miniatures["gpt-oss"], tmp_path / "dst", "-q")
    assert again.exit_code == 0 and "note: " in again.stderr and "shards kept" in again.stderr and not again.stdout


def test_verbose_says_each_step_on_stderr(miniatures, tmp_path):
    plain = call("convert", miniatures["gpt-oss"], tmp_path / "a", "--json")
    done = call("convert", miniatures["gpt-oss"], tmp_path / "b", "-v", "--json")
    assert not plain.stderr and json.loads(done.stdout)["exact"] is True
    steps = [
        "4 tensors to cast in",
        "model-00000-of-00002.safetensors: written",
        "compared with",
        "published",
    ]
    found = [done.stderr.index(step) for step in steps]
    assert found == sorted(found) and "verifying: " in done.stderr
    assert re.match(r"\d\d:\d\d:\d\d ", done.stderr.splitlines()[0])


def test_a_log_has_all_and_is_appended_to(miniatures, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    quiet = call("convert", miniatures["gpt-oss"], tmp_path / "dst", "-q", "--log", log)
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    failed = call("inspect", tmp_path / "nothing", "--log", log)
    assert failed.exit_code == 1
    first, *lines = log.read_text().splitlines()
    assert first == "before"
    stamped = [line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO) ", line)]
    assert any("published" in line for line in stamped) and any(
        " DEBUG " in line and "Scaling" in line for line in stamped
    )
    assert any("exit status 1" in line and "is not a directory" in line for line in stamped)
    assert "Traceback" in log.read_text() and "Traceback" not in failed.stderr
