"""Reads are whole or an error; copies are the same bytes, inside the kernel or not."""

import os
import random
import threading

import numpy as np
import pytest

from fp4cast.checkpoints.byte_ranges import BUFFERS, File, Files, copy_range, write_file
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


def open_files():
    return len(os.listdir("/dev/fd"))  # noqa: PTH208


@pytest.fixture
def numbered(tmp_path):
    """20 files; each holds its own number over and over."""
    paths = [tmp_path / f"{i}" for i in range(20)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 5000)
    return paths


def test_only_the_last_used_files_stay_open(numbered):
    before = open_files()
    with Files(4) as files:
        for path in numbered:
            assert files[path].read(0, 1)[0] == int(path.name)
            assert files[numbered[0]].path == numbered[0]
            assert open_files() <= before + 4
        first = files[numbered[0]]
        assert files[numbered[0]] is first, "used again and again, it was never the oldest"
        gone = files[numbered[5]]
        for path in numbered[6:]:
            files[path]
        assert gone.read(0, 1)[0] == 5, "somebody holds it"
        assert open_files() == before + 6, "4, and the two that are held"
    del first, gone
    assert open_files() == before


def test_a_file_that_a_thread_reads_from_is_not_closed_under_it(numbered):
    """Its descriptor would be given to the next file, and the thread would read that one."""
    before, wrong, errors = open_files(), [], []

    def work(seed):
        rng = random.Random(seed)  # noqa: S311
        try:
            for _ in range(2000):
                path = rng.choice(numbered)
                file = files[path]
                if {*file.read(rng.randrange(1000), 4000).tolist()} != {int(path.name)}:
                    wrong.append(path)
        except Exception as error:
            errors.append(error)

    with Files(2) as files:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert open_files() <= before + 2
    assert not wrong and not errors
    assert open_files() == before


def test_a_disk_that_takes_no_bytes_is_an_error_not_a_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="no more bytes are taken"):
        write_file(tmp_path / "x", b"data")
