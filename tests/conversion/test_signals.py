"""Real processes, really interrupted and killed."""

import json
import signal
import subprocess
import sys
import time

import pytest

from helpers import started, tree


def finish(source, destination):
    command = [sys.executable, "-m", "fp4cast", "convert", source, destination, "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_process_leaves_nothing_loadable_and_resumes(miniatures, converted, tmp_path, sent):
    process = started(miniatures["gpt-oss"], tmp_path / "dst")
    process.send_signal(sent)
    out, err = process.communicate(timeout=20)
    assert not (tmp_path / "dst").exists()
    assert not list(tmp_path.rglob("config.json"))
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command (without --restart) goes on" in json.loads(out)["error"]["message"]
        assert f"rm -r {tmp_path}/.dst.fp4cast" in err
        assert "Traceback" not in err
    finish(miniatures["gpt-oss"], tmp_path / "dst")
    assert tree(tmp_path / "dst") == tree(converted["gpt-oss"])
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_second_process_is_refused_while_the_first_works(miniatures, tmp_path):
    process = started(miniatures["gpt-oss"], tmp_path / "dst")
    command = [sys.executable, "-m", "fp4cast", "convert", miniatures["gpt-oss"], tmp_path / "dst"]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    process.kill()
    process.communicate()
    assert second.returncode == 1
    assert "another fp4cast is writing it" in second.stderr


# Both workers are in the middle of a piece and would never end.
BUSY = """
import sys, time
from fp4cast.conversion import writer
from fp4cast.cli.app import main
def busy(self, piece):
    print("busy", file=sys.stderr, flush=True)
    while True:
        time.sleep(0.01)
        self.progress(0)
writer.Writer.write = busy
main()
"""


# The kernel may hand a signal to any thread that does not block it, and then the main one does not wake.
ELSEWHERE = (
    BUSY.replace('print("busy"', 'signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\n    print("busy"')
    .replace("\nmain()", "\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\nmain()")
    .replace("import sys", "import signal, sys")
)


@pytest.mark.parametrize(("script", "jobs"), [(BUSY, 1), (BUSY, 2), (ELSEWHERE, 2)], ids=["inline", "two", "elsewhere"])
def test_ctrl_c_stops_workers_in_the_middle_of_their_pieces(miniatures, tmp_path, script, jobs):
    command = [sys.executable, "-c", script, "convert", miniatures["gpt-oss"], tmp_path / "dst", "--jobs", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "busy" not in process.stderr.readline():  # two workers may say it in one line
        assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - begin < 5
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not (tmp_path / "dst").exists()
    assert not list(tmp_path.rglob("config.json"))
