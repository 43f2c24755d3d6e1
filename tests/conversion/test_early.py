"""Shards are compared as soon as they are written; the judgement asks for each finding, and compares what has none."""

import pytest

import fp4cast
from fp4cast.conversion import compare_shard
from fp4cast.conversion.early import Early
from fp4cast.errors import VerificationError
from fp4cast.miniatures import KINDS
from fp4cast.verification import findings
from fp4cast.verification.shard_check import check_shard
from helpers import options, tree


@pytest.fixture
def compared(monkeypatch):
    """What is compared, in its order: early, and in the end."""
    seen = {"early": [], "end": []}

    def watch(place, name):
        def check(work, pool):
            seen[name] += [each.codes.name for each in work.converted] + [copy[1].name for copy in work.copies]
            return check_shard(work, pool)

        monkeypatch.setattr(place, "check_shard", check)

    watch(compare_shard, "early")
    watch(findings, "end")
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_compared_once(miniatures, converted, tmp_path, compared, kind):
    """In the end only those whose codes and scales lie in different shards."""
    report = fp4cast.convert(miniatures[kind], tmp_path / "dst", **options(kind))
    assert report.verified and report.exact and tree(tmp_path / "dst") == tree(converted[kind])
    every = compared["early"] + compared["end"]
    assert len(every) == len(set(every)) == report.tensors["cast"] + report.tensors["copied"]
    assert len(compared["early"]) > len(compared["end"])
    before = list(every)
    again = fp4cast.verify(miniatures[kind], tmp_path / "dst")
    assert (again.facts(), again.exact) == (report.facts(), True) and compared["early"] + compared["end"] == before


@pytest.mark.parametrize("how", ["forgets", "of another place", "of another type"])
def test_what_was_not_compared_just_so_is_compared_in_the_end(miniatures, tmp_path, compared, monkeypatch, how):
    judge = Early.judge

    def meddle(early):
        known = early._findings._converted
        name = next(iter(known))
        converted, *rest = known.pop(name)
        if how != "forgets":
            other = {"of another place": {"start": 0}, "of another type": {"dtype": "I8"}}[how]
            known[name] = (converted.__class__(converted.pair, converted.form, converted.codes._replace(**other),
                converted.scales, converted.tensor_scale, converted.input_scale), *rest)  # fmt: skip
        compared["end"].clear()
        report = judge(early)
        assert name in compared["end"]
        return report

    monkeypatch.setattr(Early, "judge", meddle)
    assert fp4cast.convert(miniatures["dense"], tmp_path / "dst").exact


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_wrong_byte_is_found_early(miniatures, tmp_path, monkeypatch, compared, jobs):
    """And nothing is published."""
    from fp4cast.conversion import execute

    write = execute.write_shard

    def damage(shard, path, *more):
        tallies = write(shard, path, *more)
        with path.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))
        return tallies

    monkeypatch.setattr(execute, "write_shard", damage)
    with pytest.raises(VerificationError, match="nothing was published"):
        fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst", jobs=jobs)
    assert len(compared["early"]) > len(compared["end"]) and not (tmp_path / "dst").exists()


def test_without_verification_nothing_is_compared(miniatures, tmp_path, compared):
    assert not fp4cast.convert(miniatures["dense"], tmp_path / "dst", verify=False).verified
    assert compared == {"early": [], "end": []}


def test_progress_of_both_is_whole(miniatures, tmp_path):
    done = {}

    def progress(phase, nbytes, total):
        before = done.get(phase, (0, total))
        done[phase] = before[0] + nbytes, total

    fp4cast.convert(miniatures["kimi-k3"], tmp_path / "dst", progress=progress)
    assert all(amount == total for phase, (amount, total) in done.items() if phase in ("write", "verify")), done
