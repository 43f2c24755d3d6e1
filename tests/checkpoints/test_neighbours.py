"""Many ranges read together are the ranges read one by one."""

import os

import numpy as np
import pytest

from fp4cast.checkpoints.byte_ranges import Files
from fp4cast.checkpoints.neighbours import read_ranges
from fp4cast.checkpoints.readable import merged
from fp4cast.errors import CheckpointError

SIZE = 20_000


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).write_bytes(rng.bytes(SIZE))
    return [tmp_path / "a", tmp_path / "b"]


def cut(paths, rng, most):
    """Ranges of two files, many of them neighbours, some empty."""
    ranges = []
    while len(ranges) < 3000:
        path, at = paths[rng.integers(2)], int(rng.integers(SIZE))
        for nbytes in rng.integers(0, most, rng.integers(1, 1500)).tolist():
            if at + nbytes > SIZE:
                break
            ranges.append((path, at, nbytes))
            at += nbytes
    return ranges


def read(ranges):
    buffers = [bytearray(nbytes) for _, _, nbytes in ranges]
    with Files() as files:
        read_ranges(files, [(path, start, memoryview(b)) for (path, start, _), b in zip(ranges, buffers, strict=True)])
    return [bytes(buffer) for buffer in buffers]


@pytest.mark.parametrize("most", [3, 40])
def test_they_are_read(paths, most):
    ranges = cut(paths, np.random.default_rng(most), most)
    whole = {path: path.read_bytes() for path in paths}
    assert read(ranges) == [whole[path][start : start + nbytes] for path, start, nbytes in ranges]


def test_neighbours_are_one_call_and_short_reads_are_continued(paths, monkeypatch):
    calls, real = [], os.preadv

    def short(descriptor, views, start):
        calls.append(len(views))
        left, some = 700, []
        for view in views:
            some.append(view[:left])
            left -= len(some[-1])
        return real(descriptor, some, start)

    ranges = [(paths[0], 10 * i, 10) for i in range(50)]
    monkeypatch.setattr("os.preadv", short)
    whole = paths[0].read_bytes()
    assert read(ranges) == [whole[start : start + 10] for _, start, _ in ranges]
    assert calls == [50]
    ranges = [(paths[0], 100 * i, 100) for i in range(50)]
    assert read(ranges) == [whole[start : start + 100] for _, start, _ in ranges]


def test_a_file_that_ends_is_named(paths):
    with pytest.raises(CheckpointError, match=rf"{paths[0]}: ended at byte {SIZE}, expected 5 more"):
        read([(paths[0], SIZE - 10, 4), (paths[0], SIZE - 6, 6), (paths[0], SIZE, 5)])


def test_advice_covers_all_ranges_and_little_else(paths):
    a, b = paths
    ranges = [(a, 0, 10), (a, 20, 10), (a, 30 + (65 << 10), 5), (b, 0, 5), (a, 0, 5), (a, 3, 5)]
    assert list(merged(ranges)) == [(a, 0, 30), (a, 30 + (65 << 10), 5), (b, 0, 5), (a, 0, 5), (a, 3, 5)]
    assert list(merged([])) == []
    assert [nbytes for _, _, nbytes in merged((a, i << 20, 1 << 20) for i in range(20))] == [8 << 20, 8 << 20, 4 << 20]
