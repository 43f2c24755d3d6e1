"""stdout and stderr that cannot write every character."""

import json
import os
import subprocess
import sys

import pytest

ASCII = {"PYTHONIOENCODING": "ascii"}
LATIN = {"PYTHONIOENCODING": "latin-1"}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(*arguments, **environment):
    command = [sys.executable, "-m", "fp4cast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=os.environ | {"COLUMNS": "100"} | environment, check=False)


@pytest.mark.parametrize("environment", [ASCII, LATIN, C_LOCALE], ids=["ascii", "latin-1", "C"])
def test_bars_boxes_and_names_in_encodings_that_lack_them(miniatures, tmp_path, environment):
    shown = run("inspect", miniatures["kimi-k3"], **environment)
    assert shown.returncode == 0, shown.stderr
    assert b"###" in shown.stdout, "the bars"
    boxes = run("inspect", "--help", **environment)
    assert boxes.returncode == 0, boxes.stderr
    assert b"+- Options ---" in boxes.stdout
    wrong = run("inspect", tmp_path / "d\u03c9", **environment)
    assert wrong.returncode == 1
    assert b"is not a directory" in wrong.stderr and b"Traceback" not in wrong.stderr


def test_every_command_in_ascii(miniatures, tmp_path):
    source, destination = miniatures["kimi-k3"], tmp_path / "dst\u03c9"
    for words in (
        ["convert", source, destination],
        ["verify", source, destination],
        ["verify", source, destination, "--json"],
        ["inspect", source, "--json"],
        ["demo"],
    ):
        done = run(*words, **ASCII)
        assert done.returncode == 0, done.stderr
        text = done.stdout.decode("ascii")
        if "--json" in words:
            assert json.loads(text)["exact"] is True
        elif destination in words:
            assert r"dst\u03c9" in text
    for words in (["calibrate", "\u03c9"], ["ptq", "\u03c9"], ["study", "\u03c9"], ["\u03c9"]):
        done = run(*words, **ASCII)
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr


SHOWN = {
    "names of the study": "from fp4cast.study.scenarios import ORIGINAL\n"
    "for each in ORIGINAL: Console().print(each.name, each.about)",
    "progress": "from fp4cast.cli.progress import Meter\n"
    "with Meter(Console(force_terminal=True)) as meter: meter('write', 5, 10)",
}


@pytest.mark.parametrize("what", SHOWN)
def test_signs_and_progress_in_ascii(what):
    code = "from rich.console import Console; from fp4cast.cli.streams import open_streams; open_streams()\n"
    command = [sys.executable, "-c", code + SHOWN[what]]
    done = subprocess.run(command, capture_output=True, env=os.environ | ASCII, check=False)
    assert done.returncode == 0, done.stderr
    assert (b"---" if what == "progress" else rb"\u2212") in done.stdout
