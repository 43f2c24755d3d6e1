"""`convert ORG/NAME DST --stream`: the same DST, and never more of the source on the disk than it needs."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from local_hub import TOKEN

import attention
import fp4cast
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.checkpoints.header import read_header
from fp4cast.conversion import streaming
from fp4cast.conversion.plan import ConvertOptions
from fp4cast.conversion.streaming import convert_streamed
from fp4cast.errors import CheckpointError, DestinationError, HeaderError, UsageError, VerificationError
from fp4cast.miniatures import KINDS, write_checkpoint
from helpers import Interrupted, call, flip, lossy, mounted, options, plain, raw, root_only, tree, unnamed


def streamed(dst, kind="moe", **how):
    return convert_streamed("org/model", dst, ConvertOptions(**options(kind)), **how)


def downloads(hub, shard=""):
    """The downloads of shards, or of one, that were begun: their ranges are asked for otherwise."""
    return [r for r in hub.asked(f"/storage/.*{shard}.*safetensors$", "GET") if not r.ranged]


def cut_up(source, path, shards, seed=0):
    """The same model in many shards: pairs and merged projections lie apart at random."""
    checkpoint = open_checkpoint(source)
    names = list(checkpoint.tensors)
    rng = np.random.default_rng(seed)
    bounds = [0, *sorted(rng.choice(np.arange(1, len(names)), shards - 1, replace=False).tolist()), len(names)]
    files = {
        f"model-{i + 1:05d}-of-{shards:05d}.safetensors": {
            name: (checkpoint.tensors[name].dtype, raw(source, name).reshape(-1).view(np.uint8)) for name in names[a:b]
        }
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
    }
    shaped = {
        file: {name: (dtype, _Shaped(data, checkpoint.tensors[name].shape)) for name, (dtype, data) in tensors.items()}
        for file, tensors in files.items()
    }
    write_checkpoint(path, shaped, dict(checkpoint.config))
    return path


class _Shaped:
    """Bytes with the shape of the values that they are."""

    def __init__(self, data, shape):
        self.data, self.shape, self.nbytes = data, shape, data.nbytes

    def tobytes(self):
        return self.data.tobytes()


@pytest.fixture(scope="module")
def parts(miniatures, tmp_path_factory):
    """A model in twelve shards, and its ordinary conversion."""
    root = tmp_path_factory.mktemp("parts")
    source = cut_up(miniatures["moe"], root / "src", 12)
    fp4cast.convert(source, root / "dst")
    return source, root / "dst"


class Disk:
    """What lies beside the destination, looked at whenever something has been done."""

    def __init__(self, dst):
        self.state = dst.with_name(f".{dst.name}.fp4cast")
        self.held, self.most, self.lock = 0, 0, threading.Lock()

    def __call__(self, phase, *_):
        if phase in ("scan", "check"):
            return  # what an earlier run has left is still there
        with self.lock:
            sizes = []
            for path in (self.state / "downloads").rglob("*"):
                try:
                    if path.suffix in (".safetensors", ".incomplete"):
                        sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            self.held, self.most = max(self.held, len(sizes)), max(self.most, sum(sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_the_destination_is_that_of_an_ordinary_conversion(hub, miniatures, converted, tmp_path, kind):
    commit = hub.add("org/model", miniatures[kind])
    report = streamed(tmp_path / "dst", kind)
    assert unnamed(tmp_path / "dst") == unnamed(converted[kind])  # the receipt, too
    assert report.ok
    assert report.exact
    assert report.verified
    assert report.source == f"org/model@{commit}"
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_card_and_receipt_name_the_model_and_its_commit_either_way(hub, miniatures, tmp_path):
    hub.add("org/model", miniatures["moe"])
    whole = fp4cast.convert("org/model", tmp_path / "whole")
    report = streamed(tmp_path / "dst")
    assert (report.card, report.left_out) == (str(tmp_path / "dst" / "README.md"), whole.left_out)
    assert tree(tmp_path / "dst") == tree(tmp_path / "whole")
    said = json.loads((tmp_path / "dst" / "fp4cast.json").read_text())["source"]
    assert said["id"] == "org/model" and len(said["revision"]) == 40


def test_attention_in_fp8(hub, tmp_path):
    """In twenty shards, each compared while its source is there; interrupted, and complete already: the same."""
    source = cut_up(attention.kimi_k3(tmp_path / "src"), tmp_path / "cut", 20)
    hub.add("org/model", source)
    expected = fp4cast.convert(source, tmp_path / "expected", fp8="attention")
    fp8 = ConvertOptions(fp8="attention")

    def progress(*what):
        if what[0] == "verify" and next(steps) > 60:
            raise Interrupted

    steps = itertools.count()
    with pytest.raises(Interrupted):
        convert_streamed("org/model", tmp_path / "dst", fp8, progress=progress, jobs=1)
    for _ in range(2):
        report = convert_streamed("org/model", tmp_path / "dst", fp8)
        assert unnamed(tmp_path / "dst") == unnamed(tmp_path / "expected")
        assert report.fp8 == expected.fp8
        assert not report.exact


@pytest.mark.parametrize("kind", ["gpt-oss", "deepseek-v4", "dense"])
def test_partners_in_other_shards_are_kept_as_long_as_needed(hub, miniatures, tmp_path, kind):
    source = cut_up(miniatures[kind], tmp_path / "src", 9)
    hub.add("org/model", source)
    fp4cast.convert(source, tmp_path / "expected", **options(kind))
    assert streamed(tmp_path / "dst", kind).ok
    assert unnamed(tmp_path / "dst") == unnamed(tmp_path / "expected")
    assert len(downloads(hub)) == 9


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_few_shards_are_on_the_disk_at_a_time(hub, parts, tmp_path, ahead):
    source, expected = parts
    hub.add("org/model", source)
    disk = Disk(tmp_path / "dst")
    streamed(tmp_path / "dst", ahead=ahead, progress=disk)
    assert unnamed(tmp_path / "dst") == unnamed(expected)
    largest = max(shard.size for shard in open_checkpoint(source).shards.values())
    pairs = 2  # the two parts of a pair lie in two shards at most here
    assert disk.held <= max(ahead + 1, pairs)
    assert disk.most <= max(ahead + 1, pairs) * largest
    assert len(downloads(hub)) == 12  # each once
    assert max(r.sent for r in downloads(hub)) > 0


@root_only
def test_a_disk_that_holds_the_destination_and_a_few_shards(hub, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("fp4cast.conversion.staging.FREE_MARGIN", 0)
    monkeypatch.setattr("fp4cast.conversion.streaming.FREE_MARGIN", 0)
    source, expected = parts
    hub.add("org/model", source)
    largest = max(shard.size for shard in open_checkpoint(source).shards.values())
    size = sum(path.stat().st_size for path in expected.rglob("*") if path.is_file())
    slack = 200_000  # notes, and the pages of many small files
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size + 2 * largest + slack}", "tmpfs") as disk:
        streamed(disk / "dst", ahead=9)
        assert unnamed(disk / "dst") == unnamed(expected)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size * 3 // 4}", "tmpfs") as disk:
        with pytest.raises(DestinationError, match="GB are needed there"):
            streamed(disk / "dst")
        assert list(disk.iterdir()) == []


def interrupted(dst, phase, after, **how):
    """A conversion that dies after some bytes of a phase."""
    done = [0]

    def progress(what, nbytes, total):
        if what == phase:
            done[0] += nbytes
            if done[0] > after * total:
                raise Interrupted

    with pytest.raises(Interrupted):
        streamed(dst, progress=progress, jobs=1, **how)


@pytest.mark.parametrize(("phase", "after"), [("write", 0.3), ("verify", 0.9), ("download", 0.6)])
def test_a_run_goes_on_where_another_has_stopped(hub, parts, tmp_path, phase, after):
    source, expected = parts
    hub.add("org/model", source)
    interrupted(tmp_path / "dst", phase, after)
    assert not (tmp_path / "dst").exists()
    state = tmp_path / ".dst.fp4cast"
    finished = {note.name.removesuffix(".done") for note in state.glob("*.done")}
    kept = {path.name for path in (state / "downloads").glob("*.safetensors")}
    assert finished
    hub.requests.clear()
    report = streamed(tmp_path / "dst")
    assert unnamed(tmp_path / "dst") == unnamed(expected)
    again = {r.path.rpartition("/")[2] for r in downloads(hub)}
    assert not again & kept  # what was downloaded is not downloaded again
    assert len(again) <= 12 - len(finished) + 1  # nor what was written, but for a partner that is still to compare
    assert any("shards had been finished before" in note for note in report.notes)


def test_a_killed_run_leaves_nothing_that_the_next_does_not_take_up(hub, parts, tmp_path):
    source, expected = parts
    hub.add("org/model", source)
    hub.slow = 0.1
    command = [sys.executable, "-m", "fp4cast", "convert", "org/model", str(tmp_path / "dst"), "--stream"]
    state = tmp_path / ".dst.fp4cast"
    with subprocess.Popen(command, env=os.environ | hub.environment, stderr=subprocess.DEVNULL) as process:
        while len(list(state.glob("*.done"))) < 3:
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
    left = [path.name for path in state.rglob("*.incomplete")]
    (state / "downloads" / name_of(1)).write_bytes(b"written, and to be deleted when the run was killed")
    finished = len(list(state.glob("*.done")))
    hub.slow = 0.0
    hub.requests.clear()
    disk = Disk(tmp_path / "dst")
    streamed(tmp_path / "dst", progress=disk)
    assert unnamed(tmp_path / "dst") == unnamed(expected)
    assert len(downloads(hub)) <= 12 - finished + 1
    assert disk.held <= 3, left
    assert not state.exists()


def test_ctrl_c_does_not_wait_for_downloads(hub, parts, tmp_path):
    hub.add("org/model", parts[0])
    hub.slow = 30.0
    command = [sys.executable, "-m", "fp4cast", "convert", "org/model", str(tmp_path / "dst"), "--stream"]
    environment = os.environ | hub.environment
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / ".dst.fp4cast" / "downloads").rglob("*.incomplete")):
            time.sleep(0.01)
            assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert time.monotonic() - begin < 12
    assert not (tmp_path / "dst").exists()


def test_broken_connections_are_mended(hub, parts, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source, expected = parts
    hub.add("org/model", source)
    hub.fault("GET /storage/.*00003-of.*whole", "cut")
    hub.fault("GET /storage/.*00005-of.*whole", "status", status=429)
    hub.fault("HEAD /.*00006-of", "status", status=429)
    hub.fault("GET /storage/.*00007-of.*whole", "status", status=503)
    hub.fault("GET /storage/.*00009-of.*whole", "swap", data=b"x" * read_header(source / name_of(9)).size)
    streamed(tmp_path / "dst")
    assert unnamed(tmp_path / "dst") == unnamed(expected)
    assert not hub.leaks
    assert [len(downloads(hub, f"{name:05d}-of")) for name in (3, 5, 7, 9, 11)] == [2, 2, 2, 2, 1]


def name_of(number):
    return f"model-{number:05d}-of-00012.safetensors"


def test_a_shard_that_changes_after_planning_is_not_converted(hub, parts, tmp_path, monkeypatch):
    source = shutil.copytree(parts[0], tmp_path / "src")
    commit = hub.add("org/model", source)
    real = streaming._plan

    def plan_then_change(*args):
        plan = real(*args)
        flip(next(iter(read_header(source / name_of(2)).tensors.values())), 3)
        return plan

    monkeypatch.setattr(streaming, "_plan", plan_then_change)
    expected = rf"org/model@{commit}/{name_of(2)}: expected contents of SHA-256 .*changed on the Hub"
    with pytest.raises(CheckpointError, match=expected):
        streamed(tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    assert not (tmp_path / ".dst.fp4cast" / "downloads" / name_of(2)).exists()


def test_what_the_hub_cannot_give_is_an_error_that_says_so(hub, parts, tmp_path):
    source = shutil.copytree(parts[0], tmp_path / "src")
    hub.add("org/model", source)
    hub.fault("GET /storage/.*00004-of.*whole", "status", status=404, times=99)
    with pytest.raises(CheckpointError, match=f"{name_of(4)}: the Hub refuses: .*404") as caught:
        streamed(tmp_path / "dst", ahead=0)
    assert "3 finished shards" in " ".join(caught.value.__notes__)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (source / name_of(4)).write_text(pointer)
    hub.add("org/model", source)
    with pytest.raises(HeaderError, match=r"00004-of-00012\.safetensors: is a Git LFS pointer"):
        streamed(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_written_wrong_is_found_while_the_source_is_there(hub, parts, tmp_path, monkeypatch):
    hub.add("org/model", parts[0])
    real = streaming.execute

    def execute_and_damage(shards, out, **how):
        found = real(shards, out, **how)
        for shard in shards:
            if shard.file == name_of(5):
                flip(next(t for t in read_header(out / shard.file).tensors.values() if t.dtype == "U8"), 9)
        return found

    monkeypatch.setattr(streaming, "execute", execute_and_damage)
    with pytest.raises(VerificationError, match=rf"{name_of(5)}: .*nothing was published"):
        streamed(tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    assert not [r for r in downloads(hub) if name_of(12) in r.path]
    monkeypatch.undo()


def test_a_finding_that_is_missing_is_no_success(hub, parts, tmp_path, monkeypatch):
    hub.add("org/model", parts[0])
    real = streaming._Run._judge

    def forget_one(run):
        run.notes.findings.found.popitem()
        return real(run)

    monkeypatch.setattr(streaming._Run, "_judge", forget_one)
    with pytest.raises(VerificationError, match="was not compared while its source was there"):
        streamed(tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_damaged_note_or_shard_is_compared_again(hub, parts, tmp_path):
    source, expected = parts
    hub.add("org/model", source)
    interrupted(tmp_path / "dst", "write", 0.9)
    state = tmp_path / ".dst.fp4cast"
    notes = sorted(state.glob("*.compared"))
    notes[0].write_text(notes[0].read_text().replace('"shards"', '"shard"'))
    flip(next(iter(read_header(state / "out" / name_of(2)).tensors.values())), 1)
    streamed(tmp_path / "dst")
    assert unnamed(tmp_path / "dst") == unnamed(expected)


def test_rounded_tensors_are_judged_as_ever(hub, miniatures, tmp_path):
    source = lossy(miniatures, tmp_path)
    hub.add("org/model", source)
    fp4cast.convert(source, tmp_path / "expected", inexact="nearest")
    report = convert_streamed("org/model", tmp_path / "dst", ConvertOptions(inexact="nearest"))
    assert report.ok
    assert [tensor.name for tensor in report.inexact] == ["model.layers.0.mlp.experts.0.down_proj"]
    assert unnamed(tmp_path / "dst") == unnamed(tmp_path / "expected")
    done = convert_streamed("org/model", tmp_path / "dst", ConvertOptions(inexact="nearest"))
    assert done.facts() == report.facts() | {"marlin_exact": done.marlin_exact}


def test_a_complete_destination_is_a_success_without_a_download(hub, parts, tmp_path):
    hub.add("org/model", parts[0])
    first = streamed(tmp_path / "dst")
    hub.requests.clear()
    report = streamed(tmp_path / "dst")
    assert not downloads(hub)
    assert report.facts() == first.facts()
    assert "nothing was downloaded or written" in report.notes[0]
    tensors = read_header(tmp_path / "dst" / name_of(3)).tensors.values()
    flip(next(t for t in tensors if t.nbytes > 100), 77)
    with pytest.raises(DestinationError, match=rf"files are not as they were written: 1, the first is {name_of(3)}"):
        streamed(tmp_path / "dst")
    streamed(tmp_path / "dst", overwrite=True)
    assert unnamed(tmp_path / "dst") == unnamed(parts[1])


def test_without_verification_it_is_the_same(hub, parts, tmp_path):
    hub.add("org/model", parts[0])
    report = fp4cast.convert("org/model", tmp_path / "dst", stream=True, verify=False)
    assert not report.verified
    assert unnamed(tmp_path / "dst") == unnamed(parts[1])
    assert fp4cast.verify(parts[0], tmp_path / "dst").ok


def test_the_command(hub, parts, tmp_path):
    commit = hub.add("org/model", parts[0])
    result = call("convert", "org/model@v1", tmp_path / "dst", "--stream", "--json")
    assert result.exit_code == 0, result.output
    assert f'"source": "org/model@{commit}"' in result.stdout
    assert unnamed(tmp_path / "dst") == unnamed(parts[1])
    hub.repos["org/model"].claimed[name_of(1)] = 2 * 10**9
    asked = call("convert", "org/model", tmp_path / "other", "--stream")
    assert asked.exit_code == 2
    assert re.search(r"2 GB of 2 GB would be downloaded.*, shard by shard: only a few", plain(asked.stderr))


def test_large_files_beside_the_weights_need_their_room(hub, parts, tmp_path):
    hub.add("org/model", parts[0])
    hub.repos["org/model"].claimed["config.json"] = 10**18
    with pytest.raises(DestinationError, match=r"GB are needed there for the files beside the weights.*TMPDIR"):
        streamed(tmp_path / "dst")


def test_what_cannot_be_streamed_is_wrong_usage(hub, miniatures, tmp_path):
    with pytest.raises(UsageError, match="lies on this machine; --stream is for a model on the Hub"):
        convert_streamed(str(miniatures["dense"]), tmp_path / "dst")
    with pytest.raises(UsageError, match="--stream goes from MXFP4 to NVFP4 alone"):
        fp4cast.convert("org/model", tmp_path / "dst", stream=True, to="mxfp4")
    for more in (["--shards", "1/2"], ["--finish"], ["--engine", "ray"]):
        result = call("convert", "org/model", tmp_path / "dst", "--stream", *more)
        assert result.exit_code == 2
        assert "--stream is for one process" in plain(result.stderr)
    hub.close()
    with pytest.raises(CheckpointError, match="the Hub cannot be reached; --stream needs it"):
        convert_streamed("org/model", tmp_path / "dst")
