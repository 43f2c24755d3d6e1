"""Disks that are small, full or read-only, limits, neighbours, sources that change, odd names, locales and clocks."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fp4cast
from fp4cast.errors import Fp4CastError
from helpers import MOUNT, call, mounted, options, root_only, tree

COMMAND = [sys.executable, "-m", "fp4cast"]
QUIET = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
MB = 1 << 20


def run(*args, limits=None, env=None):
    def limit():
        for what, value in (limits or {}).items():
            resource.setrlimit(what, (value, value))

    command = [*COMMAND, *args]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        preexec_fn=limit,
        env=env or QUIET,
        check=False,
    )


def clean(result):
    """No traceback, and a sentence for an error."""
    assert "Traceback" not in result.stderr + result.stdout
    assert (result.returncode == 0) != ("error:" in result.stderr)


# --- disks ------------------------------------------------------------------------------------------------------------


@root_only
def test_a_disk_that_is_too_small_and_then_grows(miniatures, converted, tmp_path, monkeypatch):
    monkeypatch.setattr("fp4cast.conversion.staging.FREE_MARGIN", 0)  # a miniature fits into any margin
    source, size = miniatures["gpt-oss"], sum(len(p.read_bytes()) for p in converted["gpt-oss"].rglob("*.safetensors"))
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", f"size={size * 3 // 4}", "tmpfs") as small:
        with pytest.raises(Fp4CastError, match="GB are needed there"):
            fp4cast.convert(source, small / "dst")
        assert list(small.iterdir()) == []
        # What else fills the disk meanwhile, no check before can know.
        monkeypatch.setattr("fp4cast.conversion.staging.Staging.check_space", lambda *_: None)
        with pytest.raises(Fp4CastError, match=r"cannot be written: No space left"):
            fp4cast.convert(source, small / "dst")
        assert not (small / "dst").exists()
        subprocess.run([MOUNT, "-o", f"remount,size={size * 4}", str(small)], check=True)
        fp4cast.convert(source, small / "dst")
        assert tree(small / "dst") == tree(converted["gpt-oss"])
        assert [path.name for path in small.iterdir()] == ["dst"]


@root_only
def test_a_read_only_disk(miniatures, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=16m", "tmpfs") as disk:
        source = shutil.copytree(miniatures["dense"], disk / "src")
        subprocess.run([MOUNT, "-o", "remount,ro", str(disk)], check=True)
        assert fp4cast.inspect(source).exact
        with pytest.raises(Fp4CastError, match="Read-only file system"):
            fp4cast.convert(source, disk / "dst")
        assert fp4cast.convert(source, tmp_path / "dst").exact


@root_only
def test_a_mount_point_of_the_same_file_system_is_refused_before_anything_is_written(miniatures, tmp_path):
    """As containers have volumes: only the rename at the end found it, once everything was written and verified."""
    (tmp_path / "volume").mkdir()
    with mounted(tmp_path / "dst", "--bind", str(tmp_path / "volume")) as destination:
        with pytest.raises(Fp4CastError, match="is a mount point"):
            fp4cast.convert(miniatures["dense"], destination)
        assert fp4cast.convert(miniatures["dense"], destination / "inside").exact


def test_files_that_may_not_grow(miniatures, tmp_path):
    """A quota: a file of more than 64 kB cannot be written."""
    result = run("convert", miniatures["gpt-oss"], tmp_path / "dst", limits={resource.RLIMIT_FSIZE: 64 << 10})
    clean(result)
    assert "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_no_destination(miniatures):
    for path in ("/dev/null", "/proc/x", "/dev/null/x"):
        with pytest.raises(Fp4CastError, match=r"^/(dev|proc)/\S*: "):
            fp4cast.convert(miniatures["dense"], path)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "convert", "verify"])
def test_little_address_space(miniatures, converted, tmp_path, command):
    """The README promises 300 MB and 64 MB a worker; address space is more, for the libraries alone."""
    source, args = miniatures["gpt-oss"], {"convert": [tmp_path / "dst"], "verify": [converted["gpt-oss"]]}
    result = run(command, source, *args.get(command, []), "--jobs", "2", limits={resource.RLIMIT_AS: 900 * MB})
    clean(result)
    assert result.returncode == 0, result.stderr


def test_an_unwritable_home(miniatures, tmp_path):
    env = QUIET | {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "HF_HOME": "/proc/nowhere"}
    result = run("convert", miniatures["dense"], tmp_path / "dst", env=env)
    clean(result)
    assert result.returncode == 0, result.stderr


# --- neighbours -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["absent", "overwrite"])
def test_several_runs_on_one_destination(miniatures, converted, tmp_path, overwrite):
    """One of them writes it; the others say that, or that it is complete; nobody leaves anything."""
    if overwrite:
        shutil.copytree(converted["gpt-oss"], tmp_path / "dst")
    command = [*COMMAND, "convert", str(miniatures["gpt-oss"]), str(tmp_path / "dst"), "--json", *overwrite]
    for _ in range(2):
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
        results = [(each, *each.communicate(timeout=60)) for each in runs]
        assert any(each.returncode == 0 for each, *_ in results)
        for each, out, err in results:
            document = json.loads(out)
            assert "Traceback" not in err
            assert document.get("exact") or "is writing it" in document["error"]["message"], (each.returncode, out)
        assert tree(tmp_path / "dst") == tree(converted["gpt-oss"])
        assert [path.name for path in tmp_path.iterdir()] == ["dst"]
        if not overwrite:
            shutil.rmtree(tmp_path / "dst")


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def rewrite(path):
    path.write_bytes(bytes(path.stat().st_size))


def replace(path):
    shutil.copy(path, path.with_suffix(".new"))
    rewrite(path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [truncate, rewrite, replace, Path.unlink, os.utime], ids=lambda f: f.__name__)
@pytest.mark.parametrize("when", [0.0, 0.4, 0.9])
def test_a_source_that_changes_meanwhile_is_never_published(miniatures, tmp_path, change, when):
    source, done = shutil.copytree(miniatures["gpt-oss"], tmp_path / "src"), [0]

    def progress(phase, nbytes, total):
        before, done[0] = done[0], done[0] + (nbytes if phase == "write" else 0)
        if phase == "write" and before <= when * total < done[0]:
            change(sorted(source.glob("*.safetensors"))[-1])

    with pytest.raises(Fp4CastError, match=r"src\S*(: |/model-00001)"):
        fp4cast.convert(source, tmp_path / "dst", progress=progress, jobs=1, verify=False)
    assert not (tmp_path / "dst").exists()


# --- names, locales, clocks -------------------------------------------------------------------------------------------

NAMES = [
    "with space",
    "new\nline",
    "esc\x1b[31m",
    "[red]x",
    "ü" * 100,
    os.fsdecode(b"\xff\xfe"),
    "-rf",
    "x" * 230,
    "*?",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_odd_names(miniatures, tmp_path, monkeypatch, name):
    source = shutil.copytree(miniatures["dense"], tmp_path / name)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    result = call("convert", f"./{name}", f"out/{name}")
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert fp4cast.verify(source, tmp_path / "out" / name).ok
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_name_that_is_too_long_is_an_error(miniatures, tmp_path):
    with pytest.raises(Fp4CastError, match="its name has 231 bytes, expected at most 230"):
        fp4cast.convert(miniatures["dense"], tmp_path / ("x" * 231))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "tr_TR.UTF-8", "de_DE.ISO-8859-1"])
def test_locales_change_no_byte(miniatures, converted, tmp_path, locale):
    env = QUIET | {"LC_ALL": locale, "LANG": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run("convert", miniatures["kimi-k3"], tmp_path / "dst", env=env)
    clean(result)
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "dst") == tree(converted["kimi-k3"])


@pytest.mark.parametrize("year", [1, 1970, 2038, 2106])
def test_clocks_and_times_change_no_byte(miniatures, converted, tmp_path, monkeypatch, year):
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    seconds = (year - 1970) * 365 * 86400 if year > 1 else -1
    for path in source.rglob("*"):
        os.utime(path, (seconds, seconds))
    jumps = iter([1e9, -1e9, 0.0, 2e9, 5.0] * 100_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    fp4cast.convert(source, tmp_path / "dst", **options("moe"))
    monkeypatch.undo()
    assert tree(tmp_path / "dst") == tree(converted["moe"])
    assert fp4cast.convert(source, tmp_path / "dst", **options("moe")).bytes["written"] == 0
