"""The help of every command: nothing is cut off, examples are true, and names have two spellings."""

import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from fp4cast.cli.app import app
from fp4cast.cli.examples import EXAMPLES
from fp4cast.cli.help import GROUPS
from helpers import call

COMMANDS = typer.main.get_command(app).commands
NAMED = [(), *((name,) for name in COMMANDS)]


def shown(words, width):
    done = CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1"}).invoke(app, [*words, "--help"])
    assert done.exit_code == 0
    return done.stdout


def parameters(command):
    return [each for each in COMMANDS[command].params if not each.hidden]


@pytest.mark.parametrize("width", [60, 80, 110])
@pytest.mark.parametrize("words", NAMED, ids=lambda words: "".join(words) or "fp4cast")
def test_no_word_is_cut_and_no_line_too_long(words, width):
    text = shown(words, width)
    whole = set(re.split(r"\s+", shown(words, 10_000)))
    assert set(re.split(r"\s+", text)) - {"\\"} <= whole, "a word that a wider help does not have"
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_name_metavar_and_choice_is_whole(command, width):
    found = set(re.split(r"[\s,]+", shown((command,), width)))
    for each in parameters(command):
        assert each.param_type_name == "argument" or {*each.opts, *each.secondary_opts} <= found
        if each.metavar and each.param_type_name == "option":
            assert set(re.split(r"[\s,]+", each.metavar)) <= found
    if command == "convert":
        assert {"<modelopt|compressed-tensors|mlx>", "<w4a16|w4a4>", "<fail|nearest>", "<local|ray>"} <= found


@pytest.mark.parametrize("command", COMMANDS)
def test_names_have_one_style_and_a_group(command):
    text = shown((command,), 80)
    for each in parameters(command):
        assert not [name for name in each.opts if "_" in name and each.param_type_name == "option"]
    titles = re.findall(r"(?m)^([A-Z][\w, ]*):$", text)
    assert titles == [title for title in [*GROUPS, "Examples"] if title in titles], "in their order"
    assert {"Output", "Examples"} <= set(titles)
    assert len(parameters(command)) < 15 or len(titles) > 5


def test_every_option_of_today_has_a_group():
    for command in ("convert", "ptq"):
        assert "\nOptions:\n" not in shown((command,), 80)


@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_every_example_is_parsed_by_the_command_that_it_names(command):
    assert EXAMPLES[command]
    text = re.sub(r" \\\n +", " ", shown((command,) if command else (), 60))
    for words, meaning in EXAMPLES[command]:
        assert f"\n  {words}\n" in text and " ".join(text.split()).count(meaning) >= 1
        program, name, *rest = shlex.split(words)
        assert program == "fp4cast" and (name == command or not command)
        with COMMANDS[name].make_context(name, rest) as context:
            assert not context.args


def test_both_spellings_of_a_name_are_accepted(miniatures, tmp_path):
    assert (
        call("convert", miniatures["moe"], tmp_path / "a", "--no_card", "--kv_cache_qformat", "fp8_cast").exit_code == 0
    )
    again = call("convert", miniatures["moe"], tmp_path / "b", "--layout", "compressed_tensors", "--no-card")
    assert again.exit_code == 0 and "compressed-tensors" in again.stdout
    for words in (["--calib_size", "0"], ["--calib-size", "0"]):
        wrong = call("calibrate", miniatures["moe"], "--out", tmp_path / "a.json", "--dataset", "x", *words)
        assert "calib_size" in wrong.stderr and wrong.exit_code == 2, wrong.stderr
    assert "--no-such" in call("convert", "a", "b", "--no_such").stderr
