"""Names of tensors stay whole: in a pipe, and in 60 columns, where they get lines of their own."""

import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from fp4cast.cli.display import show_facts, show_inexact
from fp4cast.cli.tables import show_table
from fp4cast.verification.figures import InexactTensor
from helpers import lossy

LONG = "language_model.model.layers.10.block_sparse_moe.experts.123.down_projection_of_an_expert.weight"


def shown(show, width, *arguments):
    console = Console(width=width, record=True, highlight=False, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        show(console, *arguments)
    return console.export_text()


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_names_are_whole_at_any_width(width):
    tensors = [InexactTensor(LONG, 1234, 0.5, 1e-5, 40.0), InexactTensor("short", 1, 2.0, 3.0, 4.0)]
    text = shown(show_inexact, width, tensors)
    assert re.search(rf"^{re.escape(LONG)}(\s|$)", text, re.MULTILINE) and "…" not in text
    for word in ("half-blocks", "1,234", "40.0", "dB", "short", "MSE"):
        assert word in text
    sentence = f"some words {LONG} and more of them than fit"
    facts = shown(show_facts, width, "title", [("weights", sentence), ("x", "y")])
    assert facts.split() == f"title weights {sentence} x y".split()


def test_a_table_becomes_records_only_where_it_must():
    rows = [("one", "1", "[green]yes[/]"), ("another", "22", "no")]
    wide = shown(show_table, 80, "what", ("name", "count", "good"), rows, (1,)).splitlines()
    assert wide[:2] == ["what", "name     count  good"] and wide[3].rstrip() == "another     22  no"
    narrow = shown(show_table, 12, "what", ("name", "count", "good"), rows, (1,)).splitlines()
    assert narrow == ["what", "one", "    count 1,", "    good yes", "another", "    count", "    22, good", "    no"]


def run(*words, **environment):
    known = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "fp4cast", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=known | environment, check=False)
    assert "Traceback" not in done.stderr
    return done.stdout


def test_what_is_piped_is_not_folded_and_what_has_columns_is(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    name = "model.layers.0.mlp.experts.0.down_proj"
    for words in (["inspect", source], ["convert", source, tmp_path / "dst", "--inexact", "nearest"]):
        piped = run(*words)
        assert re.search(rf"(^|\s){re.escape(name)}(\s|$)", piped, re.MULTILINE) and "…" not in piped
        assert any(len(line) > 100 for line in piped.splitlines()), "nothing is folded"
    for words in (["inspect", source], ["verify", source, tmp_path / "dst"]):
        folded = run(*words, COLUMNS="60")
        assert name in folded and "…" not in folded
        facts = [line for line in folded.splitlines() if re.match(r"(?!next)\w[\w-]* {2,}|\s{8,}", line)]
        assert len(facts) > 8 and max(map(len, facts)) <= 60
    assert run("inspect", source, COLUMNS="60").split() == run("inspect", source).split(), "the same words"


def test_every_difference_keeps_its_name(miniatures, converted):
    for environment in ({}, {"COLUMNS": "60"}):
        text = run("verify", miniatures["moe"], converted["dense"], **environment)
        names = re.findall(r"^differs (\S+): ", text, re.MULTILINE)
        assert len(names) == 8 and all("." in name for name in names)
