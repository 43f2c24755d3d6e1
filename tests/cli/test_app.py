"""The command line as a person and as a script sees it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import typer

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.checkpoints.transpose import compiled
from fp4cast.cli.app import app
from fp4cast.cli.environment import CORE, EXTRAS
from helpers import call, flip, lossy, options, plain

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_a_help_text(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    shown = plain(result.stdout)
    for parameter in COMMANDS[command].params:
        assert parameter.name == "help" or parameter.help, parameter.name
        assert max(parameter.opts, key=len) in shown or parameter.metavar in shown


def test_the_commands_are_these():
    assert set(COMMANDS) == {"inspect", "convert", "verify", "card", "calibrate", "ptq", "study", "demo", "env", "push"}
    assert {"--shards", "--finish", "--engine"} <= {opt for p in COMMANDS["convert"].params for opt in p.opts}


def test_version():
    assert call("--version").stdout.strip() == f"fp4cast {fp4cast.__version__}"


def test_wrong_usage_is_exit_status_2(miniatures, tmp_path):
    assert call("convert", miniatures["moe"]).exit_code == 2
    assert call("convert", miniatures["moe"], tmp_path / "d", "--layout", "gguf").exit_code == 2
    assert call("convert", miniatures["moe"], tmp_path / "d", "--activations", "w4a4").exit_code == 2
    assert call("convert", miniatures["deepseek-v4"], tmp_path / "d").exit_code == 2
    assert call("nothing").exit_code == 2
    assert not (tmp_path / "d").exists()


def test_inspect_json_is_the_contract(miniatures):
    result = call("inspect", miniatures["kimi-k3"], "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert {"source", "family", "exact", "domains", "bytes"} <= document.keys()
    assert document["family"] == "kimi-k3"
    at = "language_model.model.layers.1.block_sparse_moe.experts.0"
    (domain,) = [d for d in document["domains"] if d["name"] == f"{at}.w1+w3"]
    top = domain["k_max"]
    assert domain == {
        "name": f"{at}.w1+w3",
        "tensors": [f"{at}.w1", f"{at}.w3"],
        "k_min": top - 18,
        "k_max": top,
        "spread": 18,
        "m": top - 8,
        "exact": True,
        "marlin_exact": False,
    }
    assert len({d["m"] for d in document["domains"]}) > 3, "domains differ, so that no two could be confused"


def test_inspect_of_an_inexact_checkpoint_is_an_answer_not_a_failure(miniatures, tmp_path):
    result = call("inspect", lossy(miniatures, tmp_path), "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["exact"] is False
    assert [d["m"] for d in document["domains"] if not d["exact"]] == [None]


KEYS = {
    "source", "destination", "family", "layout", "activations", "exact", "tensors", "half_blocks", "inexact",
    "marlin_exact", "bytes", "seconds",
}  # fmt: skip


@pytest.mark.parametrize("kind", mini.KINDS)
def test_convert_and_verify_json_are_the_contract(miniatures, tmp_path, kind):
    extra = [] if "activations" not in options(kind) else ["--activations", "w4a4", "--input-scales", "1.0"]
    done = call("convert", miniatures[kind], tmp_path / "dst", "--json", *extra)
    assert done.exit_code == 0
    for document in (
        json.loads(done.stdout),
        json.loads(call("verify", miniatures[kind], tmp_path / "dst", "--json").stdout),
    ):
        assert document.keys() >= KEYS
        assert document["exact"] is True
        assert set(document["tensors"]) == {"cast", "exact", "inexact", "copied"}
        assert set(document["half_blocks"]) == {"verbatim", "shifted", "rounded"}
        assert set(document["bytes"]) == {"read", "written"}
        assert document["seconds"] > 0


def test_nearest_says_what_is_lost(miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    refused = call("convert", source, tmp_path / "dst")
    assert refused.exit_code == 1
    assert "--inexact nearest" in refused.stderr
    done = call("convert", source, tmp_path / "dst", "--inexact", "nearest", "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["exact"] is False
    (tensor,) = document["inexact"]
    assert set(tensor) == {"name", "rounded_half_blocks", "max_abs_error", "mse", "snr_db"}
    text = call("verify", source, tmp_path / "dst").stdout
    assert "not exact: 1 of 24 tensors are rounded" in text
    assert "dB" in text


def test_a_failed_verification_is_exit_status_1_and_says_what(miniatures, converted, tmp_path):
    destination = shutil.copytree(converted["moe"], tmp_path / "dst")
    tensor = open_checkpoint(destination).tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
    flip(tensor, 3)
    result = call("verify", miniatures["moe"], destination)
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "model.layers.0.mlp.experts.1.up_proj.weight: 1 half-blocks hold other values" in result.stdout
    document = json.loads(call("verify", miniatures["moe"], destination, "--json").stdout)
    assert document["exact"] is False
    assert [d["kind"] for d in document["differences"]] == ["values"]
    assert document["ok"] is False
    assert document["verdicts"] == {"weights": False, "documents": True, "companions": True}


def test_the_headline_of_a_failure_does_not_say_verified(miniatures, converted, tmp_path):
    destination = shutil.copytree(converted["moe"], tmp_path / "dst")
    (destination / "hf_quant_config.json").unlink()
    result = call("verify", miniatures["moe"], destination)
    assert result.exit_code == 1
    assert result.stdout.startswith("failed ")
    assert "verified" not in result.stdout.split("\n", 1)[0]
    assert "exact: every value" in result.stdout and "weights      WRONG" not in result.stdout


def test_an_edited_companion_is_named_and_its_exit_status_is_that_of_strict(miniatures, converted, tmp_path):
    destination = shutil.copytree(converted["dense"], tmp_path / "dst")
    (destination / "LICENSE").write_text("another licence")
    told = call("verify", miniatures["dense"], destination)
    assert told.exit_code == 0
    assert "LICENSE: differs from the source's" in told.stdout and "WRONG" not in told.stdout
    assert call("verify", miniatures["dense"], destination, "--strict").exit_code == 1


def test_errors_in_json_are_one_document_on_stdout_and_a_message_on_stderr(tmp_path):
    result = call("inspect", tmp_path / "nothing", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "CheckpointError"
    assert "is not a directory" in result.stderr


def test_names_with_markup_are_printed_as_they_are(tmp_path):
    result = call("inspect", tmp_path / "[bold]x")
    assert "[bold]x: is not a directory" in result.stderr


@pytest.mark.parametrize("source", ["x" * 5000, "foo/bar--baz", "foo/..", "no\0thing"])
def test_impossible_sources_are_errors_not_crashes(source):
    result = call("inspect", source)
    assert result.exit_code == 1
    assert "error:" in result.stderr


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path):
    codes, scales = np.zeros((1, 16), np.uint8), np.full((1, 1), 255, np.uint8)
    tensors = {"\x1b[31mred.weight_packed": ("U8", codes), "\x1b[31mred.weight_scale": ("U8", scales)}
    mini.write_checkpoint(tmp_path / "src", {"model-1.safetensors": tensors}, {})
    result = call("inspect", tmp_path / "src")
    assert result.exit_code == 1
    assert "\x1b" not in result.stderr.replace("\x1b[1;31merror:\x1b[0m", "")
    assert "\\x1b[31mred" in result.stderr


def test_a_destination_that_claims_what_nobody_serves_is_a_failed_check(miniatures, converted, tmp_path):
    destination = shutil.copytree(converted["deepseek-v4"], tmp_path / "dst")
    text = (destination / "config.json").read_text().replace('"NVFP4"', '"W4A16_NVFP4"')
    (destination / "config.json").write_text(text)
    assert call("verify", miniatures["deepseek-v4"], destination).exit_code == 1


def test_the_summary_says_in_words_what_is_exact(miniatures, tmp_path):
    text = call("convert", miniatures["kimi-k3"], tmp_path / "dst").stdout
    assert "exact: every value equals the source's, bit for bit (measured on what was written)" in text
    assert "44 shifted by a power of two, 0 rounded" in text
    assert "Marlin" in text
    w4a4 = call("convert", miniatures["moe"], tmp_path / "x", "--activations", "w4a4", "--input-scales", "1").stdout
    assert "that part is not lossless" in w4a4
    unread = call("convert", miniatures["moe"], tmp_path / "y", "--no-verify").stdout
    assert "not read back" in unread


def test_inspect_shows_both_windows(miniatures):
    text = call("inspect", miniatures["kimi-k3"]).stdout
    assert "yes: all 16 scale domains can be cast bit for bit" in text
    assert "2 of 16 domains fit its window of 14 binades" in text


def test_the_demo_shows_every_family(tmp_path):
    result = call("demo", "--json", "--out", tmp_path / "kept")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["exact"] is True
    assert [row["kind"] for row in document["families"]] == list(mini.KINDS)
    assert all(row["flip_found"] for row in document["families"])
    assert (tmp_path / "kept" / "gpt-oss-NVFP4" / "config.json").exists()
    assert call("demo", "--out", tmp_path / "kept").exit_code == 1
    assert "exact" in call("demo").stdout


@pytest.mark.parametrize("module", [["-m", "fp4cast"], ["-c", "from fp4cast.cli import main; main()"]])
def test_as_a_process(module, miniatures, tmp_path):
    done = subprocess.run(
        [sys.executable, *module, "convert", miniatures["dense"], tmp_path / "dst", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["exact"] is True


def test_a_model_id_is_found_in_the_hub_cache_when_offline(miniatures, tmp_path):
    cache = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(miniatures["dense"], cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def inspect(name):
        command = [sys.executable, "-m", "fp4cast", "inspect", name, "--json"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert json.loads(inspect("someone/tiny").stdout)["family"] == "compressed-tensors"
    missing = inspect("someone/else")
    assert missing.returncode == 1
    assert "the Hub cache holds no model of that id" in missing.stderr


def test_progress_is_plain_lines_where_there_is_no_terminal():
    from rich.console import Console

    from fp4cast.cli.progress import Meter

    console = Console(record=True, force_terminal=False, width=100, file=io.StringIO())
    with Meter(console, every=0.0) as meter:
        meter("write", 500_000_000, 2_000_000_000)
    assert re.search(r"writing: 500 MB of 2 GB, .*/s, \d+ s left", console.export_text())


def test_summaries_end_with_the_command_that_serves_and_count_what_marlin_loses(miniatures, tmp_path):
    """The miniature has a spread of 18: eight half-blocks lie below Marlin's window."""
    done = call("convert", miniatures["gpt-oss"], tmp_path / "dst")
    assert done.stdout.splitlines()[-1] == (
        f"next  vllm serve {tmp_path / 'dst'}   # vLLM 0.26.0, with fp4cast installed beside it (run)"
    )
    document = json.loads(call("verify", miniatures["gpt-oss"], tmp_path / "dst", "--json").stdout)
    assert document["marlin_zeroed"] == 8 and document["serve"].startswith("vllm serve ")
    assert f"computes {document['marlin_zeroed']} half-blocks" in done.stdout
    assert "serve vllm serve DST   # vLLM 0.26.0" in call("inspect", miniatures["gpt-oss"]).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert",), "Missing argument 'SRC'"),
        (("inspect", "x", "--bogus"), "No such option: --bogus"),
        (("convert", "a", "b", "--layout", "x"), "'x' is not one of 'modelopt', 'compressed-tensors'"),
        (("convert", "a", "b", "--jobs", "0"), "Invalid value for '--jobs'"),
        (("nothing",), "No such command 'nothing'"),
        (("ptq", "--bogus"), "No such option: --bogus"),
    ],
)
def test_wrong_usage_is_one_document_too(words, message):
    result = call(*words, "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "UsageError" and message in error["message"]
    assert message in result.stderr
    plain = call(*words)
    assert plain.exit_code == 2 and not plain.stdout


@pytest.mark.parametrize("words", [(), ("convert",), ("ptq",)])
def test_help_has_a_short_name(words):
    assert call(*words, "-h").stdout == call(*words, "--help").stdout
    assert "Usage:" in call(*words, "-h").stdout


def test_env_says_what_a_bug_report_needs():
    found = json.loads(call("env", "--json").stdout)
    assert found["fp4cast"] == fp4cast.__version__ and found["core"]["numpy"] == np.__version__
    assert found["compiled_transpose"] is compiled() and found["cpus"] >= 1
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {extra: {re.split("[>=]", each)[0] for each in needs} for extra, needs in
             declared["optional-dependencies"].items()}  # fmt: skip
    assert {extra: set(each) for extra, each in EXTRAS.items()} == names
    assert set(CORE) == {re.split("[>=]", each)[0] for each in declared["dependencies"]}
    assert found["extras"].keys() == names.keys()
    shown = call("env").stdout
    assert shown.startswith(f"fp4cast {fp4cast.__version__}") and "transpose" in shown and "gpus" in shown


def test_what_is_left_out_is_said_and_fails_nothing(miniatures, tmp_path):
    source = shutil.copytree(miniatures["dense"], tmp_path / "src")
    before = json.loads(call("convert", source, tmp_path / "a", "--json").stdout)["left_out"]
    for folder in ("original", "metal/deep", "kept", ".cache"):
        (source / folder).mkdir(parents=True)
    for file in (
        "original/x.pth",
        "metal/deep/model.bin",
        "kept/notes.txt",
        "kept/w.gguf",
        "extra.safetensors",
        ".cache/y",
    ):
        (source / file).write_text("x")
    (source / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    done = call("convert", source, tmp_path / "b", "--json")
    assert done.exit_code == 0
    expected = ["elsewhere/", "extra.safetensors", "kept/w.gguf", "metal/", "original/"]
    assert json.loads(done.stdout)["left_out"] == sorted({*before, *expected})
    assert not {"original", "metal", "elsewhere", ".cache"} & {path.name for path in (tmp_path / "b").iterdir()}
    assert (tmp_path / "b" / "kept" / "notes.txt").exists()
    shown = call("convert", source, tmp_path / "c").stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("left out")]
    assert all(name in line for name in expected)
    assert call("verify", source, tmp_path / "b", "--strict").exit_code == 0
