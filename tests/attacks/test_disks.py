"""File systems that lack calls, are short, fail or go away, as networks and object stores have them: on a real FUSE."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fp4cast
from fp4cast.checkpoints.file_system import is_remote
from fp4cast.conversion.job_array import finish
from fp4cast.errors import CheckpointError, DestinationError
from fuse import left, on
from helpers import call, older, root_only, started, tree
from helpers import mounted as mounted_local

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import checkpoints

pytestmark = root_only
COMMAND = [sys.executable, "-m", "fp4cast"]


# --- all commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt-oss", "moe"])
@pytest.mark.parametrize("where", ["source", "destination", "both"])
def test_every_command_where_either_side_is_there(miniatures, converted, disk, tmp_path, kind, where):
    source = miniatures[kind] if where == "destination" else on(disk, miniatures[kind])
    destination = (tmp_path if where == "source" else disk.path) / "dst"
    assert fp4cast.inspect(source).exact
    assert fp4cast.convert(source, destination).exact
    assert tree(destination) == tree(converted[kind])
    assert fp4cast.verify(source, destination).ok
    assert call("verify", destination).exit_code == 0  # its files alone
    assert fp4cast.convert(source, destination, resume=True).bytes["written"] == 0
    assert left(disk) == [name for name in ("dst", "src") if (disk.path / name).exists()]


def test_overwrite_there(miniatures, converted, disk):
    destination = older(converted, disk.path / "dst")
    assert fp4cast.convert(miniatures["dense"], destination, overwrite=True).exact
    assert disk.change()["RENAME2"] == 1, "the kernel was asked to exchange both"
    assert tree(destination) == tree(converted["dense"])
    assert left(disk) == ["dst"]


def test_a_job_array_there(miniatures, converted, disk):
    source = on(disk, miniatures["gpt-oss"])
    parts = [["convert", source, disk.path / "dst", "--json", "--shards", f"{i}/2"] for i in (1, 2)]
    both = [subprocess.Popen([*COMMAND, *map(str, part)], stdout=subprocess.DEVNULL) for part in parts]
    assert [process.wait(timeout=30) for process in both] == [0, 0]
    assert finish(source, disk.path / "dst").exact
    assert tree(disk.path / "dst") == tree(converted["gpt-oss"])
    assert left(disk) == ["dst", "src"]


def test_resume_after_a_kill_there(miniatures, converted, disk):
    source = on(disk, miniatures["gpt-oss"])
    process = started(source, disk.path / "dst")
    process.kill()
    process.communicate(timeout=20)
    assert not (disk.path / "dst").exists()
    report = fp4cast.convert(source, disk.path / "dst")
    assert report.bytes["written"] < sum(path.stat().st_size for path in (disk.path / "dst").glob("*.safetensors"))
    assert tree(disk.path / "dst") == tree(converted["gpt-oss"])
    assert left(disk) == ["dst", "src"]


# --- what it may lack -------------------------------------------------------------------------------------------------

LACKS = {
    "fsync is not there": {"errors": {"FSYNC": "ENOSYS", "FSYNCDIR": "ENOSYS"}},
    "fsync has no meaning": {"errors": {"FSYNC": "EINVAL", "FSYNCDIR": "EINVAL"}},
    "fsync is not supported": {"errors": {"FSYNC": "ENOTSUP", "FSYNCDIR": "ENOTSUP"}},
    "no permissions, no times": {"errors": {"SETATTR mode": "EPERM", "SETATTR times": "EPERM"}},
    "no statfs": {"errors": {"STATFS": "ENOSYS"}},
    "no access": {"errors": {"ACCESS": "EACCES"}},
    "reads and writes are short": {"short": ["READ", "WRITE"], "direct": True},
    "writes into the page cache are short": {"short": ["WRITE"]},
}


@pytest.mark.parametrize("name", LACKS)
def test_what_is_lacking_is_done_without(miniatures, converted, disk, name):
    source = on(disk, miniatures["gpt-oss"]) if name.split()[-1] != "writes" or "reads" in name else None
    disk.change(**LACKS[name])
    source = source or miniatures["gpt-oss"]
    assert fp4cast.convert(source, disk.path / "dst").exact
    assert fp4cast.verify(source, disk.path / "dst").ok
    disk.change(errors={}, short=[])
    assert tree(disk.path / "dst") == tree(converted["gpt-oss"])
    assert left(disk) == ["dst", "src"]


def test_a_disk_that_knows_no_size_is_not_full(miniatures, converted, disk):
    """Object stores say that they have 0 of 0 bytes."""
    disk.change(size=0)
    assert shutil.disk_usage(disk.path) == (0, 0, 0)
    assert fp4cast.convert(miniatures["dense"], disk.path / "dst").exact
    assert tree(disk.path / "dst") == tree(converted["dense"])


# --- what may fail ----------------------------------------------------------------------------------------------------

FAULTS = {
    "a source that cannot be read": ("READ", "EIO", "src/model-0000", 1, r"src/model-0000\S+: cannot be read"),
    "a source that has gone": ("OPEN", "ESTALE", "src/model-00001", 0, r"src/model-00001\S+: cannot be read"),
    "a shard that cannot be written": ("WRITE", "EIO", ".partial", 2, r"model-0000\S+: cannot be written"),
    "a shard that cannot be enlarged": ("SETATTR", "EIO", ".partial", 0, r"model-0000\S+: cannot be written"),
    "a shard that cannot be closed": ("FLUSH", "EDQUOT", ".partial", 0, r"model-0000\S+: cannot be written"),
    "a shard that cannot be synced": ("FSYNC", "EIO", "model-0000", 0, r"model-0000\S+: cannot be written"),
    "a shard that cannot be read back": ("READ", "EIO", "out/model-0000", 0, r"out/model-0000\S+: cannot be read"),
    "a document that cannot be written": ("WRITE", "EIO", ".json", 0, r"\.json: Input/output error"),
    "a directory that cannot be made": ("MKDIR", "EROFS", "", 0, r"\.dst\.fp4cast: cannot be made"),
    "names that cannot be found": ("LOOKUP", "ESTALE", "dst", 6, r"dst\S+: .*Stale file handle"),
    "a directory that cannot be listed": ("OPENDIR", "ETIMEDOUT", "dst", 2, r"dst\S*: .*Connection timed out"),
    "a rename that fails": ("RENAME", "EIO", "", 1, r"\.dst\.fp4cast.*Input/output error"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_names_the_file_and_leaves_nothing_published(miniatures, converted, disk, name):
    request, code, only, after, match = FAULTS[name]
    source = on(disk, miniatures["gpt-oss"])
    disk.change(errors={request: code}, only=only, after=after)
    with pytest.raises((CheckpointError, DestinationError), match=match):
        fp4cast.convert(source, disk.path / "dst", jobs=1)
    disk.change(errors={})
    assert not (disk.path / "dst").exists()
    assert not list(disk.behind.glob(".dst*/out/config.json"))
    assert fp4cast.convert(source, disk.path / "dst").exact
    assert tree(disk.path / "dst") == tree(converted["gpt-oss"])
    assert left(disk) == ["dst", "src"]


@pytest.mark.parametrize("phase", ["scan", "write", "verify"])
def test_a_disk_that_goes_away_is_an_error_of_one_sentence(miniatures, disk, phase):
    """As a program that serves a FUSE file system dies: nothing more can even be looked at there."""
    script = (
        "import os, signal, sys\n"
        "from fp4cast.conversion import convert as converting\n"
        "import fp4cast\n"
        "def progress(phase, *_):\n"
        f"    if phase == {phase!r}: os.kill({disk.server.pid}, signal.SIGKILL)\n"
        "try:\n"
        "    fp4cast.convert(sys.argv[1], sys.argv[2], progress=progress)\n"
        "except fp4cast.Fp4CastError as error:\n"
        "    sys.exit(f'{error} {error.__notes__ if hasattr(error, \"__notes__\") else []}')\n"
    )
    command = [sys.executable, "-c", script, on(disk, miniatures["gpt-oss"]), disk.path / "dst"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "Transport endpoint is not connected" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (disk.behind / "dst").exists()


@pytest.mark.parametrize("when", [0, 5, 20])
def test_a_read_that_ends_early_is_an_error_and_never_a_zero(miniatures, converted, disk, when):
    source = on(disk, miniatures["gpt-oss"])
    disk.change(direct=True, ends=when)
    with pytest.raises(CheckpointError, match=r"src/model-0000\S+: (ended at byte \d+|\d+ bytes are too short)"):
        fp4cast.convert(source, disk.path / "dst", jobs=1)
    disk.change(direct=False, ends=-1)
    assert fp4cast.convert(source, disk.path / "dst").exact
    assert tree(disk.path / "dst") == tree(converted["gpt-oss"])


# --- how it is read ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """13 MB of experts whose codes are copied: reads of more than the kernel's read-ahead."""
    path = tmp_path_factory.mktemp("larger") / "src"
    experts = checkpoints.experts(checkpoints.kimi_expert, 2, 2048, 2048, checkpoints.KIMI_NAMES)
    checkpoints.write(path, checkpoints.Draft([experts], checkpoints.KIMI_CONFIG))
    return path


def test_a_conversion_reads_each_byte_of_its_source_once_and_a_verification_those_of_both(larger, disk):
    source, size = on(disk, larger), sum(path.stat().st_size for path in larger.iterdir())
    disk.change(keep=True)  # as NFS does
    assert fp4cast.convert(source, disk.path.parent / "dst").exact
    assert size * 0.9 < disk.change()["bytes read"] < size * 1.02
    shutil.copytree(disk.path.parent / "dst", disk.behind / "dst")
    disk.change(keep=False)
    assert fp4cast.verify(disk.path / "src", disk.path / "dst").ok
    assert disk.change()["bytes read"] < 2.3 * size  # opened again, a file's pages are forgotten


@pytest.mark.parametrize("work", ["convert", "verify"])
def test_the_requests_of_a_large_read_wait_together(larger, disk, tmp_path, work):
    source, written = on(disk, larger), disk.path / "dst"
    if work == "verify":
        fp4cast.convert(larger, disk.behind / "dst")
    disk.change(latency=0.01)
    if work == "verify":
        assert fp4cast.verify(source, written, jobs=1).ok
    else:
        assert fp4cast.convert(source, tmp_path / "dst", jobs=1, verify=False).exact
    assert disk.change()["reads at a time"] >= 12


def test_what_is_far_and_what_is_not(disk, tmp_path):
    assert is_remote(disk.path.stat().st_dev)
    assert not is_remote(tmp_path.stat().st_dev)
    with mounted_local(tmp_path / "memory", "-t", "tmpfs", "tmpfs") as memory:
        assert not is_remote(memory.stat().st_dev)
