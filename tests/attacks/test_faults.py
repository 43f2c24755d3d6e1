"""A hundred of the points of `faults.py`, and breaks in the program that it must find."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from attacks import fault_points
from attacks.fault_points import KINDS, Point, Unavailable, anytime, attempt_all, build, sample, servers
from attacks.fault_scenarios import LARGE, SCENARIOS

pytestmark = pytest.mark.xdist_group("faults")  # one process starts the server, for all of them
POINTS, KILLS, SEED = 96, 4, 0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    try:
        with servers(tmp_path_factory.mktemp("faults"), 1, megabytes=10) as [one]:
            yield one
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def points(server):
    return sample([point for name in SCENARIOS for point in server.points(name)], POINTS, SEED)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_fault_leaves_dst_absent_or_complete_and_the_next_run_ends_in_the_same_bytes(server, points, scenario):
    mine = [point for point in points if point.scenario == scenario]
    results = list(attempt_all([server], mine))
    assert mine
    assert not [str(result) for result in results if result.broken]


def test_a_kill_at_any_time_of_a_larger_conversion(server):
    results = list(attempt_all([server], anytime(list(LARGE), KILLS, SEED)))
    assert not [str(result) for result in results if result.broken]
    assert {result.found["how"] for result in results} <= {"killed", "done"}


def test_every_kind_of_change_is_a_point(server, points):
    calls = [call for name in SCENARIOS for call in server.calls(name)]
    assert {name.removesuffix("64") for name, _, _ in calls} >= {
        "open", "pwrite", "copy_file_range", "ftruncate", "fsync", "rename", "renameat2", "link", "mkdir", "unlink",
        "unlinkat", "rmdir",
    }  # fmt: skip
    assert {point.kind for point in points} == set(KINDS)
    assert {name: len(server.calls(name)) for name in SCENARIOS if len(server.calls(name)) < 30} == {}


# What somebody might do to the program, and the points must notice: (how, scenario, kind, what is said).
BREAKS = {
    "the older DST is deleted first": (
        """
import shutil
from fp4cast.conversion.staging import Staging
def replace(self):
    shutil.rmtree(self.destination)
    self.out.rename(self.destination)
Staging._replace = replace
""",
        ("overwrite", "kill-before", "DST is absent, and there was one"),
    ),
    "the older DST is moved aside, although the system can exchange it": (
        """
from fp4cast.conversion.staging import Staging
def replace(self):
    self.destination.rename(self.state / "aside")
    self.out.rename(self.destination)
Staging._replace = replace
""",
        ("overwrite", "kill-after", "DST is absent, and there was one"),
    ),
    "files are copied into DST one after the other": (
        """
import shutil
from pathlib import Path
rename = Path.rename
Path.rename = lambda self, to: shutil.copytree(self, to) if self.name == "out" else rename(self, to)
""",
        ("fresh", "kill-after", "neither absent nor complete"),
    ),
    "config.json comes before the shards": (
        """
from fp4cast.conversion.staging import Staging
adopt = Staging.adopt
def early(self, *args, **options):
    adopt(self, *args, **options)
    (self.out / "config.json").write_bytes(b"{}")
Staging.adopt = early
""",
        ("fresh", "kill-before", "an engine would load"),
    ),
    "an error is swallowed": (
        """
import contextlib
from fp4cast.conversion import writer
write_all = writer.write_all
def swallow(*args):
    with contextlib.suppress(OSError):
        write_all(*args)
writer.write_all = swallow
""",
        ("no verify", "ENOSPC", "said that it succeeded"),
    ),
    "an OSError gets out": (
        """
from fp4cast.conversion import staging
staging.OSError = KeyError  # what `except OSError` there means
""",
        ("fresh", "EIO", "raised OSError"),
    ),
    "the source is written": (
        """
from fp4cast.conversion import convert
check = convert.check_unchanged
def touch(plan):
    check(plan)
    (plan.source.checkpoint.path / "mark").write_bytes(b"")
convert.check_unchanged = touch
""",
        ("no verify", "kill-after", "the source has changed"),
    ),
}


@pytest.mark.usefixtures("server")  # or skipped
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_found(tmp_path, name):
    prelude, (scenario, kind, said) = BREAKS[name]
    said_so: Counter[str] = Counter()
    with servers(tmp_path, 1, prelude=prelude) as [broken]:
        for point in list(broken.points(scenario, [kind]))[::-1]:
            said_so.update(broken.attempt(point).broken)
            if any(said in line for line in said_so):
                return
    pytest.fail(f"not found; {said_so}")


@pytest.mark.usefixtures("server")
def test_the_script_tries_one_point_and_writes_figures(tmp_path):
    script, figures = Path(fault_points.__file__).with_name("faults.py"), tmp_path / "faults.json"
    options = ["--only", "overwrite:5:kill-after", "--json", figures, "--dir", tmp_path]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "overwrite:5:kill-after at " in done.stdout
    written = json.loads(figures.read_text())
    assert (written["points"], written["broken"], written["findings"]) == (1, 0, [])
    assert written["outcomes"]["killed"] == 1


def test_points_are_spread_and_the_same_each_time():
    points = [Point("a", n, "EIO") for n in range(100)]
    assert sample(points, 10, 3) == sample(points, 10, 3)
    assert {b.call - a.call for a, b in zip(sample(points, 10, 3), sample(points, 10, 3)[1:], strict=False)} == {10}
    assert sample(points, 200, 3) == points
    assert Point.parse(str(Point("overwrite, no exchange", 7, "kill-before"))).call == 7


def test_without_a_compiler_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    with pytest.raises(Unavailable, match=r"does not compile|has no LD_PRELOAD"):
        build(tmp_path)
