"""Ctrl-C in every command, at every moment: no traceback, exit status 130, and how to go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer

from fp4cast.cli.app import app
from helpers import tree

COMMANDS = typer.main.get_command(app).commands
# Says when Ctrl-C is in hand.
START = """
import sys
class Hook:
    def find_spec(self, name, *_):
        if name == "fp4cast.cli.app":
            print("ready", file=sys.stderr, flush=True)
sys.meta_path.insert(0, Hook())
"""
# Says when the work begins, which then waits; `env` has none.
WORK = """
import sys, time
from fp4cast.cli.progress import Meter, Steps
def wait(self):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
Meter.__enter__ = Steps.__enter__ = wait
"""
# Says when the work is done, and the report is to be printed.
REPORT = """
import sys, time
from fp4cast.cli import card_command, console, convert_command, demo_command, push_commands, verify_command
def wait(*_):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
for module in (card_command, convert_command, demo_command, push_commands, verify_command):
    module.people_console = wait
"""
RUN = "from fp4cast.cli import main; main()"


def words(command, miniatures, converted, tmp_path):
    source, destination = miniatures["dense"], converted["dense"]
    return {
        "convert": [source, tmp_path / "dst"],
        "verify": [source, destination],
        "inspect": [source],
        "card": [source, destination],
        "calibrate": [source, "--out", tmp_path / "amax.json", "--dataset", "x.txt"],
        "ptq": ["--model", source, "--qformat", "nvfp4", "--export-path", tmp_path / "dst"],
        "push": [destination, "org/name", "--yes"],
        "study": ["--quick"],
    }.get(command, [])


def interrupted(script, arguments, delay=0.0):
    """(exit status, stdout, stderr) of a process whose group gets a SIGINT, as from a terminal, when it is ready."""
    command = [sys.executable, "-c", script + RUN, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr.readline() == "ready\n"
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, (arguments, delay, err)
    return process.returncode, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_while_it_starts(command, miniatures, converted, tmp_path):
    given = words(command, miniatures, converted, tmp_path)
    for delay in (0.0, 0.02, 0.06):  # the quickest of them need twice as long
        code, out, err = interrupted(START, [command, *given], delay)
        if code == 0:
            assert command == "env" and delay and not err, "the one that may be done so soon"
            continue
        assert code == 130
        assert err.startswith("error: interrupted: ") and err.count("\n") == 1 and not out
        assert "the same command" in err or "with --overwrite" in err or "--out names" in err


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"env"}))
@pytest.mark.parametrize("as_json", [False, True])
def test_while_it_works(command, as_json, miniatures, converted, tmp_path):
    before = tree(tmp_path)
    given = words(command, miniatures, converted, tmp_path)
    code, out, err = interrupted(WORK, [command, *given, *["--json"] * as_json], 0.1)
    assert code == 130
    message = err.removeprefix("error: ").strip()
    own = {"card": "writes it whole", "demo": "what was made is deleted", "push": "the same command goes on"}
    assert message.startswith("interrupted: ") and own.get(command, "the same command begins anew") in message
    assert (json.loads(out)["error"] == {"type": "KeyboardInterrupt", "message": message}) if as_json else not out
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("command", "own"), [("convert", "{} was written; only"), ("verify", "nothing was written")])
def test_after_the_work(command, own, miniatures, converted, tmp_path):
    code, _, err = interrupted(REPORT, [command, *words(command, miniatures, converted, tmp_path)], 0.1)
    assert code == 130
    assert own.format(tmp_path / "dst") in err and err.count("\n") == 1
    assert (tmp_path / "dst").exists() == (command == "convert")


def test_a_document_comes_at_any_moment(miniatures):
    for delay in (0.0, 0.1):
        code, out, err = interrupted(START, ["inspect", miniatures["dense"], "--json"], delay)
        assert code == 130 and json.loads(out)["error"]["message"] in err
