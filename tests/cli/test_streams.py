"""stdout and stderr that cannot write every character, or nothing at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tree

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
    boxes = run("inspect", **environment)
    assert boxes.returncode == 2
    assert b"+- Error ---" in boxes.stderr
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


def into(target, *arguments):
    """The exit status and stderr of a command whose stdout is a full device, a pipe without a reader, or closed."""
    command = [sys.executable, "-m", "fp4cast", *map(str, arguments)]
    if target == "full":
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    elif target == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
    else:
        shell = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
        done = subprocess.run(shell, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


REASON = {"full": "error: stdout: No space left on device", "closed": "error: stdout: Bad file descriptor"}


@pytest.mark.parametrize("target", ["full", "pipe", "closed"])
def test_a_conversion_whose_report_is_lost_has_succeeded(miniatures, converted, tmp_path, target):
    destination = tmp_path / "dst"
    code, err = into(target, "convert", miniatures["dense"], destination)
    assert code == 0
    assert err == ("" if target == "pipe" else f"{REASON[target]}; {destination} was written\n")
    assert tree(destination) == tree(converted["dense"])


@pytest.mark.parametrize("target", ["full", "pipe", "closed"])
def test_a_lost_document_is_a_failure(miniatures, tmp_path, target):
    code, err = into(target, "convert", miniatures["dense"], tmp_path / "dst", "--json")
    assert code == 1
    assert err == ("" if target == "pipe" else f"{REASON[target]}; {tmp_path / 'dst'} was written\n")
    assert (tmp_path / "dst" / "config.json").exists()


@pytest.mark.parametrize("target", ["full", "pipe", "closed"])
def test_a_command_that_only_looks_fails_with_its_output(miniatures, converted, target):
    source, destination = miniatures["dense"], converted["dense"]
    dry = ["convert", source, destination.parent / "new", "--dry-run"]
    for words in (
        dry,
        ["inspect", source],
        ["inspect", source, "--json"],
        ["verify", source, destination],
        ["--version"],
    ):
        assert into(target, *words) == (1, "" if target == "pipe" else REASON[target] + "\n")


@pytest.mark.parametrize("target", ["full", "pipe"])
def test_the_demo_and_help_fail_with_their_output(target):
    for words in (["demo"], ["demo", "--json"], ["--help"]):
        assert into(target, *words) == (1, "" if target == "pipe" else REASON[target] + "\n")


def test_a_part_says_which_it_was(miniatures, tmp_path):
    code, err = into("full", "convert", miniatures["gpt-oss"], tmp_path / "dst", "--shards", "1/2")
    assert (code, err) == (0, f"{REASON['full']}; part 1 of 2 of {tmp_path / 'dst'} was written\n")


def test_errors_keep_their_message_and_their_exit_status(miniatures, converted, tmp_path):
    code, err = into("full", "inspect", tmp_path / "nothing", "--json")
    assert code == 1
    assert "is not a directory" in err and err.endswith(REASON["full"] + "\n")
    words = f"error: {tmp_path / 'nothing'}: is not a directory; nothing is there. Check the path\n"
    assert into("full", "inspect", tmp_path / "nothing") == (1, words)
    assert into("full", "convert", miniatures["moe"], tmp_path / "d", "--activations", "w4a4")[0] == 2
    assert into("pipe", "verify", miniatures["moe"], converted["dense"]) == (1, "")


STUB = """
import dataclasses, sys, types
module = types.ModuleType("fp4cast.ptq.{module}")
module.{function} = lambda *_, **__: types.SimpleNamespace(
    out="amax.json", exported=types.SimpleNamespace(destination="dst"), to_json=lambda: dict(a=1)
)
module.Options = dataclasses.make_dataclass("Options", [])
for name in ("fp4cast.ptq", "fp4cast.ptq.headroom", "fp4cast.ptq.layerwise"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["fp4cast.ptq.headroom"].Headroom = None
sys.modules[module.__name__] = module
from fp4cast.cli import model_commands, main
model_commands._show = model_commands._show_amax = lambda *_: print("the report")
main()
"""
CALIBRATE = ["calibrate", "src", "--out", "amax.json", "--dataset", "text"]
PTQ = ["ptq", "--pyt_ckpt_path", "src", "--qformat", "nvfp4", "--export_path", "dst"]


@pytest.mark.parametrize(
    ("module", "function", "words", "written"),
    [("layerwise.calibrate", "calibrate", CALIBRATE, "amax.json"), ("flow", "quantize", PTQ, "dst")],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_commands_that_run_a_model_say_what_they_wrote(module, function, words, written, as_json):
    script = STUB.replace("{module}", module).replace("{function}", function)
    command = [sys.executable, "-c", script, *words, *["--json"] * as_json]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == f"{REASON['full']}; {written} was written\n"
    assert done.returncode == as_json


def test_a_lost_stderr_stops_nothing(miniatures, tmp_path):
    """Progress goes there."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fp4cast", "convert", miniatures["dense"], tmp_path / "dst", "--json"]
    script = (
        "import fp4cast.cli.progress as p; p.Meter.__init__.__defaults__ = (0.0,); from fp4cast.cli import main; main()"
    )
    command[1:3] = ["-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 0
    assert json.loads(done.stdout)["exact"] is True
