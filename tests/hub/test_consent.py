"""Sizes are shown, and more than 1 GB is not downloaded unasked."""

import os
import pty
import subprocess
import sys

import pytest

from helpers import call, plain, unnamed

SHARD = "model-00001-of-00002.safetensors"
SAID = r"would be downloaded, in 7 files"


@pytest.fixture
def large(hub, miniatures):
    """The commit of a repository that says that it is large."""
    commit = hub.add("org/model", miniatures["moe"])
    hub.repos["org/model"].claimed[SHARD] = 1_000_000_000
    return commit


def test_without_a_terminal_a_large_download_needs_yes(hub, large, converted, tmp_path):
    for command in (["convert", "org/model", tmp_path / "dst"], ["verify", "org/model", converted["moe"]]):
        result = call(*command)
        assert result.exit_code == 2
        said = plain(result.stderr)
        assert f"org/model@{large}: 1 GB of 1 GB would be downloaded, in 7 files. Pass --yes to agree" in said
    assert not hub.asked("/storage/")
    assert not (tmp_path / "dst").exists()


@pytest.mark.usefixtures("large")
def test_who_agrees_is_not_asked(hub, converted, tmp_path):
    result = call("convert", "org/model", tmp_path / "dst", "--yes", "--json")
    assert result.exit_code == 0, result.output
    assert SAID in result.stderr
    assert unnamed(tmp_path / "dst") == unnamed(converted["moe"])
    again = call("verify", "org/model", tmp_path / "dst")  # the Hub cache has it now
    assert again.exit_code == 0
    assert SAID not in again.stderr
    assert len([r for r in hub.asked("/storage/", "GET") if SHARD in r.path]) == 1


def test_small_downloads_and_directories_are_not_asked_for(hub, miniatures, converted, tmp_path):
    hub.add("org/model", miniatures["dense"])
    assert SAID not in call("convert", "org/model", tmp_path / "dst").output
    assert unnamed(tmp_path / "dst") == unnamed(converted["dense"])
    hub.requests.clear()
    assert call("verify", miniatures["dense"], tmp_path / "dst").exit_code == 0
    assert not hub.requests


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("answer", "code"), [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_it_is_asked(hub, tmp_path, answer, code):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fp4cast", "convert", "org/model", str(tmp_path / "dst")]
    environment = os.environ | hub.environment
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        while b"Download that? [y/N]" not in said:
            said += os.read(ours, 4096)
        assert not hub.asked("/storage/")
        os.write(ours, answer)
        try:
            while part := os.read(ours, 4096):
                said += part
        except OSError:  # the other side is closed
            pass
    os.close(ours)
    assert process.returncode == code, said
    assert (tmp_path / "dst").exists() == (code == 0)
    assert (b"nothing was done, as you wished" in said) == (code == 1)
