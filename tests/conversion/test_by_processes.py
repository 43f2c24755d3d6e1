"""Conversions and verifications by processes: the same bytes, findings, errors and progress as with threads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import fp4cast
from fp4cast.errors import CheckpointError
from fp4cast.miniatures import KINDS
from fp4cast.parallel.engines import SWITCH
from fp4cast.verification.files import verify_files
from helpers import edit, lossy, options, tree


@pytest.fixture(autouse=True)
def _processes(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_in_the_same_bytes(miniatures, converted, tmp_path, kind):
    done = {}

    def progress(phase, nbytes, total):
        done[phase] = done.get(phase, (0,))[0] + nbytes, total

    report = fp4cast.convert(miniatures[kind], tmp_path / "dst", jobs=2, progress=progress, **options(kind))
    assert report.exact and report.verified and tree(tmp_path / "dst") == tree(converted[kind])
    assert {"write", "verify"} <= done.keys()
    assert all(amount == total for amount, total in done.values()), done


def test_the_way_back_and_a_note_of_what_was_proved(miniatures, converted, tmp_path):
    report = fp4cast.convert(converted["kimi-k3"], tmp_path / "back", to="mxfp4", jobs=2)
    assert report.verified and report.original
    for path in miniatures["kimi-k3"].glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_rounded_weights_are_measured_alike(miniatures, tmp_path, monkeypatch):
    source, reports = lossy(miniatures, tmp_path), []
    for said in "01":
        monkeypatch.setenv(SWITCH, said)
        reports.append(fp4cast.convert(source, tmp_path / said, inexact="nearest", jobs=2))
    assert reports[0].inexact and reports[0].inexact == reports[1].inexact
    assert tree(tmp_path / "0") == tree(tmp_path / "1")


@pytest.fixture
def wrong(miniatures, converted, tmp_path):
    """A destination with wrong bytes in both of its shards."""
    destination = shutil.copytree(converted["gpt-oss"], tmp_path / "wrong")
    for name in ("model.layers.0.mlp.router.weight", "model.layers.1.mlp.experts.down_proj_weight_scale"):
        edit(destination, name, lambda data: data.__setitem__(3, data[3] ^ 1))
    return miniatures["gpt-oss"], destination


def test_the_same_findings(wrong, monkeypatch):
    found = []
    for said in "01":
        monkeypatch.setenv(SWITCH, said)
        found.append((fp4cast.verify(*wrong, jobs=2), verify_files(wrong[1], jobs=2)))
    (values, files), (again, files_again) = found
    assert values.differences == again.differences and len(values.differences) == 2
    assert values.facts() == again.facts() and values.notes == again.notes
    assert files.differences == files_again.differences and len(files.differences) == 2


def test_the_same_error(miniatures, tmp_path, monkeypatch):
    """Of a source whose second shard ends early after it was planned; nothing is published."""
    source, said = shutil.copytree(miniatures["gpt-oss"], tmp_path / "src"), []
    last = sorted(source.glob("*.safetensors"))[-1]
    whole = last.read_bytes()

    def progress(phase, nbytes, total):
        if phase == "scan" and seen.setdefault("scan", 0) + nbytes == total:
            os.truncate(last, len(whole) - 1)
        seen[phase] = seen.get(phase, 0) + nbytes

    for switch in "01":
        monkeypatch.setenv(SWITCH, switch)
        last.write_bytes(whole)
        seen = {}
        with pytest.raises(CheckpointError, match="ended at byte") as caught:
            fp4cast.convert(source, tmp_path / "dst", jobs=2, restart=True, progress=progress)
        assert not (tmp_path / "dst").exists() and "write" in seen
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1] and str(last) in said[0][1]


# Interpreters that find this as `sitecustomize` wait in the second shard; the file is removed before the resumption.
SLOW = """
import os, sys, time
from fp4cast.conversion import execute
write = execute.write_shard
def slow(shard, path, progress, pool):
    if shard.file.startswith("model-00001"):
        with open(os.environ["FP4CAST_TEST"], "w") as file:
            file.write(str(os.getpid()))
        while True:
            time.sleep(0.01)
            progress(0)
    return write(shard, path, progress, pool)
execute.write_shard = slow
"""


@pytest.fixture
def started(miniatures, tmp_path):
    """A conversion that has written one of two shards, and the id of the process that waits in the other."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SLOW)
    path = os.pathsep.join([str(site), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "FP4CAST_TEST": str(site / "pid")}
    command = [sys.executable, "-m", "fp4cast", "convert", miniatures["gpt-oss"], tmp_path / "dst", "--jobs", "2"]
    process = subprocess.Popen(
        [*command, "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    note = tmp_path / ".dst.fp4cast" / "model-00000-of-00002.safetensors.done"
    deadline = time.monotonic() + 30
    while not (note.exists() and (site / "pid").exists() and (site / "pid").read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    yield process, int((site / "pid").read_text())
    process.kill()
    process.wait()


@pytest.mark.parametrize("how", ["Ctrl-C", "parent killed", "worker killed"])
def test_an_interruption_leaves_no_process_and_what_is_finished_is_kept(miniatures, converted, tmp_path, started, how):
    process, worker = started
    begin = time.monotonic()
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    else:
        os.kill(process.pid if how == "parent killed" else worker, signal.SIGKILL)
    out, err = process.communicate(timeout=20)
    while (status := stat_of(worker)) not in ("", "Z"):
        assert time.monotonic() - begin < 4, status
        time.sleep(0.01)
    assert not (tmp_path / "dst").exists() and "Traceback" not in err
    if how == "Ctrl-C":
        assert process.returncode == 130
        assert "the same command (without --restart) goes on" in json.loads(out)["error"]["message"]
    elif how == "worker killed":
        assert process.returncode == 1
        assert f"the worker process {worker} was killed by SIGKILL" in json.loads(out)["error"]["message"]
    report = fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst", jobs=2)
    assert report.exact and any("1 of 2 shards had been finished" in note for note in report.notes)
    assert tree(tmp_path / "dst") == tree(converted["gpt-oss"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "site"]


def stat_of(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def test_a_script_without_a_guard_in_a_directory_of_foreign_modules(miniatures, converted, tmp_path):
    """Nothing of the script runs twice, and no module of the working directory is imported."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('a foreign module')")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "script.py"
    script.write_text(
        f"import sys; sys.path += {sys.path!r}\nprint('once')\nimport fp4cast\n"
        f"fp4cast.convert({str(miniatures['dense'])!r}, {str(tmp_path / 'dst')!r}, jobs=2)\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")
    assert tree(tmp_path / "dst") == tree(converted["dense"])
