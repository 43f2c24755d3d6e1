"""Reads are whole or an error; copies are the same bytes, inside the kernel or not."""

import os
import threading

import numpy as np
import pytest

from fp4cast.checkpoints.byte_ranges import BUFFERS, File, copy_range
from fp4cast.errors import CheckpointError


def test_a_missing_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        File(tmp_path / "nothing")


def test_a_short_read_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(10))
    with File(path) as file, pytest.raises(CheckpointError, match="ended at byte 10, expected 6 more"):
        file.read(8, 8)


@pytest.mark.parametrize("gap", [0, 3, 1000])
def test_gather_equals_indexing(tmp_path, gap):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (500, 16), np.uint8)
    (tmp_path / "x").write_bytes(b"head" + data.tobytes())
    blocks = np.flatnonzero(rng.random(500) < 0.2)
    with File(tmp_path / "x") as file:
        np.testing.assert_array_equal(file.gather(4, blocks, 16, gap), data[blocks])
        assert file.gather(4, blocks[:0], 16).shape == (0, 16)


@pytest.mark.parametrize("kernel", ["yes", "refuses", "another kernel"])
def test_copy_range(tmp_path, monkeypatch, kernel):
    if kernel == "another kernel":
        monkeypatch.delattr(os, "copy_file_range")
    if kernel == "refuses":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(18, "cross-device")))
    data = os.urandom(1 << 20)
    (tmp_path / "a").write_bytes(data)
    target = os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT)
    done = []
    with File(tmp_path / "a") as source:
        copy_range(source, 100, target, 7, 1_000_000, done.append)
        with pytest.raises(CheckpointError, match="ended at byte"):
            copy_range(source, 0, target, 1 << 21, (1 << 20) + 1)
    os.close(target)
    assert (tmp_path / "b").read_bytes()[7 : 7 + 1_000_000] == data[100 : 100 + 1_000_000]
    assert sum(done) == 1_000_000


def test_a_buffer_is_reused_by_its_thread_alone():
    a = BUFFERS.tile(10)
    assert np.shares_memory(a, BUFFERS.tile(2, 5))
    assert not np.shares_memory(a, BUFFERS.copy(10))
    others = []
    thread = threading.Thread(target=lambda: others.append(BUFFERS.tile(10)))
    thread.start()
    thread.join()
    assert not np.shares_memory(a, others[0])
