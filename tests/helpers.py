"""What tests share: reading and changing checkpoints, interrupting a conversion, calling the command line."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fp4cast
from fp4cast import miniatures as mini
from fp4cast.checkpoints.byte_ranges import File
from fp4cast.checkpoints.card_files import is_card_file
from fp4cast.checkpoints.checksums import checksum_of_path
from fp4cast.checkpoints.directory import open_checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.cli.app import app
from fp4cast.families.recognise import read_source
from fp4cast.layouts.choose import targets_of
from fp4cast.verification.receipt import Receipt

MOUNT, UMOUNT = shutil.which("mount") or "", shutil.which("umount") or ""


def _targets(kind):
    """What a kind of miniature can be converted into."""
    with tempfile.TemporaryDirectory() as scratch:
        return targets_of(read_source(open_checkpoint(mini.make(kind, Path(scratch, kind)))).family)


TARGETS = {kind: _targets(kind) for kind in mini.KINDS}
VARIANTS = [(kind, each.layout.name, each.activations) for kind, targets in TARGETS.items() for each in targets]
DEEPSEEK = {"deepseek-v4", "deepseek-v4.1"}


def options(kind):
    """What convert needs for a kind beside the defaults."""
    return {} if TARGETS[kind][0].activations == "w4a16" else {"activations": "w4a4", "input_scales": 1.0}


def tree(path):
    """Every file below a directory by its digest."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def unnamed(path):
    """Like `tree`, but for what says where the source is from: the card, and a line of the receipt and its digest."""
    found = {name: digest for name, digest in tree(path).items() if name not in ("README.md", "fp4cast.json")}
    receipt = json.loads((path / "fp4cast.json").read_text())
    receipt.pop("source", None)
    receipt.pop("digest")
    receipt["files"].pop("README.md")
    return found | {"fp4cast.json": receipt}


def tensor_of(path, name):
    """A tensor by its own name, or by that under which its family sees it."""
    checkpoint = open_checkpoint(path)
    return checkpoint.tensors.get(name) or read_source(checkpoint).checkpoint.tensors[name]


def raw(path, name):
    tensor = tensor_of(path, name)
    with File(tensor.path) as file:
        return file.read(tensor.start, tensor.nbytes)


def scalar(path, name):
    return float(raw(path, name).view("<f4")[0])


def edit(path, name, change):
    """Change the bytes of one tensor in place."""
    tensor = tensor_of(path, name)
    data = raw(path, name)
    change(data)
    with tensor.path.open("r+b") as file:
        file.seek(tensor.start)
        file.write(data.tobytes())


def lossy(miniatures, tmp_path):
    """A copy with one domain that is not exact: a spread of 18 with codes that fill both ends."""
    source = shutil.copytree(miniatures["moe"], tmp_path / "src")
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    edit(source, f"{name}_scale", lambda data: data.__setitem__(1, data[0] - 18))  # block 0 is the largest
    edit(source, f"{name}_packed", lambda data: data.__setitem__(slice(0, 32), 0x71))
    return source


class Interrupted(Exception):
    pass


def interrupted(source, destination, after, **extra):
    """A conversion that dies after some bytes."""
    done = [0]
    lock = threading.Lock()

    def progress(phase, nbytes, total):
        if phase == "write":
            with lock:
                done[0] += nbytes
                if done[0] > after * total:
                    raise Interrupted

    with pytest.raises(Interrupted):
        fp4cast.convert(source, destination, progress=progress, jobs=1, **extra)


def older(converted, path):
    """A destination that an earlier conversion has written, of a model with another licence."""
    shutil.copytree(converted["dense"], path)
    (path / "LICENSE").write_text("older")
    receipt = Receipt.read(path)
    files = {**receipt.files, "LICENSE": checksum_of_path(path / "LICENSE")}
    (path / "fp4cast.json").write_bytes(replace(receipt, files=files).to_bytes())
    return path


def flip(tensor: Tensor, bit: int) -> None:
    with tensor.path.open("r+b") as file:
        file.seek(tensor.start + bit // 8)
        byte = file.read(1)[0]
        file.seek(tensor.start + bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def contents(directory):
    """All files' bytes by path, but for receipt and card, which `ptq` writes otherwise or not at all."""
    files = {path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()}
    ours = {name for name in files if str(name) == "fp4cast.json" or is_card_file(str(name))}
    return {name: path.read_bytes() for name, path in files.items() if name not in ours}


def call(*args):
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, [str(arg) for arg in args])


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@contextmanager
def mounted(path, *options):
    """A file system of its own; skipped where nobody may mount."""
    path.mkdir(exist_ok=True)
    done = subprocess.run([MOUNT, *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run([UMOUNT, "-l", str(path)], check=True)


root_only = pytest.mark.skipif(os.geteuid() != 0 or not MOUNT, reason="only root may mount")


# The first shard is written at once, the second waits to be interrupted.
SLOW = """
import sys, time
from fp4cast.conversion import execute as executing
from fp4cast.cli.app import main
write = executing.write_shard
def slow(shard, *rest):
    if shard.file.startswith("model-00001"):
        print("waiting", file=sys.stderr, flush=True)
        while True:
            time.sleep(0.01)
            rest[1](0)
    return write(shard, *rest)
executing.write_shard = slow
main()
"""


def started(source, destination):
    """A conversion of gpt-oss that has written one of its two shards and waits in the other."""
    command = [sys.executable, "-c", SLOW, "convert", source, destination, "--jobs", "2", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    note = destination.parent / f".{destination.name}.fp4cast" / "model-00000-of-00002.safetensors.done"
    deadline = time.monotonic() + 30
    while not note.exists():
        assert time.monotonic() < deadline, process.poll()
        time.sleep(0.01)
    return process
