"""Small tensors that are written and compared together: the same bytes and the same report, with few calls."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import fp4cast
from fp4cast.conversion import together as written
from fp4cast.verification import together as compared
from helpers import options, tree

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scale

KINDS = ["kimi-k3", "deepseek-v4", "moe", "dense", "gpt-oss"]


@pytest.mark.parametrize("limits", [(-1, 1, 1), (1 << 30, 1, 1), (1 << 30, 1 << 30, 5)], ids=["alone", "one", "five"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_do_not_depend_on_what_is_written_together(
    kind, limits, miniatures, converted, tmp_path, monkeypatch
):
    for name, value in zip(("SMALL_BYTES", "TOGETHER_BYTES", "MOST"), limits, strict=True):
        monkeypatch.setattr(written, name, value)
    for jobs in (1, 3):
        fp4cast.convert(miniatures[kind], tmp_path / f"dst{jobs}", jobs=jobs, **options(kind))
        assert tree(tmp_path / f"dst{jobs}") == tree(converted[kind])


def facts(source, destination):
    """All of a report but its time, and all the progress."""
    steps = []
    report = fp4cast.verify(source, destination, progress=lambda done, total: steps.append((done, total)))
    assert sum(done for done, _ in steps) <= steps[0][1]
    return report.to_json() | {"seconds": 0, "done": sum(done for done, _ in steps)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_does_not_depend_on_what_is_compared_together(kind, miniatures, tmp_path, monkeypatch):
    """Undamaged, and with a bit flipped in any tensor of the last shard."""
    fp4cast.convert(miniatures[kind], tmp_path / "dst", **options(kind))
    shard = sorted((tmp_path / "dst").glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(1)
    for at in [None, *rng.integers(begin, len(whole), 12).tolist()]:
        damaged = bytearray(whole)
        if at is not None:
            damaged[at] ^= 1 << rng.integers(8)
        shard.write_bytes(damaged)
        together = facts(miniatures[kind], tmp_path / "dst")
        with monkeypatch.context() as patch:
            patch.setattr(compared, "SMALL_BLOCKS", 0)
            assert facts(miniatures[kind], tmp_path / "dst") == together
        assert together["ok"] == (at is None)


def test_many_small_tensors_cost_few_calls(tmp_path, monkeypatch):
    pairs, calls = 300, dict.fromkeys(("preadv", "pwrite", "copy_file_range"), 0)
    scale.make_pairs(tmp_path / "src", pairs, 4)

    def counted(name, real):
        def call(*given):
            calls[name] += 1
            return real(*given)

        return call

    for name in calls:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    report = fp4cast.convert(tmp_path / "src", tmp_path / "dst", verify=False)
    assert report.tensors["cast"] == pairs
    assert calls["preadv"] < pairs + 100, "one for the scales of each; those and the codes are then read together"
    assert calls["pwrite"] + calls["copy_file_range"] < 100
    calls["preadv"] = 0
    assert fp4cast.verify(tmp_path / "src", tmp_path / "dst").exact
    assert calls["preadv"] < 100
