"""A thousand of the flips and lies of `flips.py`; and that script notices what a worse `verify` would miss."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attacks import flips
from attacks.flips import BARE, Figures, flip_bits, tell_lies
from attacks.lies import LIES
from attacks.rotten import make_cases
from fp4cast.verification.report import Difference


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return make_cases(tmp_path_factory.mktemp("rotten"))


def test_every_flip_and_every_lie_is_found_and_named(cases):
    figures = Figures()
    flip_bits(cases, 900, 1, figures)
    tell_lies(cases, 2 * len(cases) * len(LIES) // 4, 1, figures)
    assert not figures.misses
    assert figures.total() > 1000
    regions = {region for _, region, _ in figures.counts}
    assert len(regions) > 40 and {"__metadata__", "codes", f"config.json{BARE}", "fp4cast.json"} <= regions
    assert figures.total("free") < 40


def with_differences(change):
    def verify(source, destination):
        report = flips.VERIFY(source, destination)
        return replace(report, differences=[new for each in report.differences if (new := change(each))])

    return verify


WORSE = {
    "ignores the documents": (lambda d: d if d.area == "weights" else None, "missed", "config.json"),
    "names nothing": (lambda d: Difference("?", d.kind, "something is wrong"), "unnamed", "codes"),
}


@pytest.mark.parametrize("worse", WORSE)
def test_a_worse_verify_is_noticed(cases, worse):
    change, outcome, region = WORSE[worse]
    figures = Figures()
    flip_bits(cases[-2:], 60, 2, figures, with_differences(change))
    assert figures.total(outcome, region) > 0
    assert figures.failed == figures.total("missed") + figures.total("unnamed") > 0
    assert any(miss.startswith(f"{outcome}: dense-") for miss in figures.misses)
    assert flips.document(figures, 2, 1.0)["missed"] == figures.failed


def test_the_flips_are_the_same_each_time(cases):
    runs = [Figures(), Figures()]
    for figures in runs:
        flip_bits(cases[:1], 40, 3, figures)
    assert runs[0] == runs[1]


def test_flips_leave_no_trace(cases):
    before = [path.read_bytes() for path in sorted(cases[0].destination.rglob("*")) if path.is_file()]
    flip_bits(cases[:1], 30, 4, Figures())
    assert before == [path.read_bytes() for path in sorted(cases[0].destination.rglob("*")) if path.is_file()]


def test_the_program_writes_its_table(tmp_path):
    program = Path(flips.__file__)
    command = [sys.executable, program, "--flips", "30", "--lies", "10", "--json", tmp_path / "flips.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "flips.json").read_text())
    assert document["changes"] >= 30 and document["missed"] == 0
    assert document["regions"]["codes"]["changes"] > 0
    for table in (document["regions"], document["conversions"]):
        assert sum(row["changes"] for row in table.values()) == document["changes"]
