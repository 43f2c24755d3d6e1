"""Shell completion: commands, options and choices by fp4cast, files and directories by the shell."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest


@pytest.fixture
def environment(tmp_path):
    """One in which the command `fp4cast` exists, and a directory to complete."""
    command = tmp_path / "bin" / "fp4cast"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom fp4cast.cli import main\nmain()\n")
    command.chmod(0o755)
    (tmp_path / "work" / "checkpoints-of-mine").mkdir(parents=True)
    return os.environ | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}


def run(environment, *words, **extra):
    """What the command prints."""
    command = [shutil.which("fp4cast", path=environment["PATH"]), *words]
    done = subprocess.run(command, env=environment | extra, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout


def completed(environment, shell, line):
    extra = {"_FP4CAST_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    extra["COMP_WORDS" if shell == "bash" else "_TYPER_COMPLETE_ARGS"] = line
    return run(environment, COMP_CWORD=str(line.count(" ")), **extra).split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_options_and_choices(environment, shell):
    for line, found in (
        ("fp4cast con", ["convert"]),
        ("fp4cast convert --layo", ["--layout"]),
        ("fp4cast convert --layout ", ["modelopt", "compressed-tensors"]),
        ("fp4cast ptq --calib-s", ["--calib-size", "--calib-seq"]),
        ("fp4cast verify --engine r", ["ray"]),
    ):
        assert all(any(word in each for each in completed(environment, shell, line)) for word in found), line


def typed(environment, directory, keys, end, seconds=60):
    """What an interactive bash shows until `end`, when these keys are typed at once."""
    terminal, inner = pty.openpty()
    shell = subprocess.Popen(
        [shutil.which("bash"), "--norc", "--noprofile", "-i"],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        cwd=directory,
        env=environment | {"PS1": "$ ", "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(inner)
    text, deadline = "", time.monotonic() + seconds
    os.write(terminal, keys.encode())
    while end not in text and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.5)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
    shell.kill()
    shell.wait()
    os.close(terminal)
    return text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("keys", "end"),
    [
        ("fp4cast conv\t", "fp4cast convert "),
        ("fp4cast convert --layout comp\t", "--layout compressed-tensors"),
        ("fp4cast inspect check\t", "inspect checkpoints-of-mine/"),
        ("fp4cast demo --out check\t", "--out checkpoints-of-mine/"),
    ],
)
def test_in_a_real_shell(environment, tmp_path, keys, end):
    script = run(environment, "--show-completion", "bash")
    (tmp_path / "completion").write_text(script.replace("\t", "    "))
    shown = typed(environment, tmp_path / "work", f". {tmp_path}/completion\n{keys}", end)
    assert end in shown, shown


def test_it_is_installed(environment, tmp_path):
    assert "completion installed" in run(environment, "--install-completion", "bash")
    (script,) = [path for path in tmp_path.rglob("*.sh") if "fp4cast" in path.name]
    assert "fp4cast" in script.read_text() and str(script.name) in (tmp_path / ".bashrc").read_text()
