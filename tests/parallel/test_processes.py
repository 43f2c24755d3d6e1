"""Processes keep the order, stop together, name what killed one of them, and leave none behind."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import fp4cast
import work
from fp4cast.errors import EngineError, UsageError
from fp4cast.parallel import engines, process_worker, processes
from fp4cast.parallel.engines import Local, want_processes
from fp4cast.parallel.processes import Processes


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"  # that nobody waits for


def pids(marks):
    return {int(path.suffix[1:]) for path in marks.iterdir() if path.suffix[1:].isdigit()}


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_results_in_order_and_every_byte_of_both_callbacks():
    done, second = [], []
    found = list(Processes(5).map(work.square, [1, 2, 3], done.append, second.append, nbytes=lambda i: i))
    assert [result for result, _, _ in found] == [1, 4, 9]
    assert [jobs for _, jobs, _ in found] == [1, 2, 2]  # the largest came first
    assert len({pid for _, _, pid in found} | {os.getpid()}) == 4
    assert not any(alive(pid) for _, _, pid in found)
    assert sum(done) == 600 and sum(second) == 1200


def test_more_items_than_processes_and_few_reports():
    done = []
    found = list(Processes(4, most=2).map(work.square, list(range(9)), done.append))
    assert [result for result, _, _ in found] == [i * i for i in range(9)]
    assert len({pid for _, _, pid in found}) == 2 and [jobs for _, jobs, _ in found] == [2] * 8 + [4]
    assert sum(done) == 3600 and len(done) < 60


def test_a_process_has_this_ones_modules_path_and_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FP4CAST_TEST", "yes")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "warnoptions", ["ignore::DeprecationWarning"])
    (found,) = Processes(1).map(work.where, [0], print)
    expected = [fp4cast.__file__, sys.path, "yes", signal.SIG_IGN, ["ignore::DeprecationWarning"]]
    assert list(found) == expected


@pytest.mark.parametrize(
    ("fail", "kind", "says"),
    [
        (work.taken, work.TakenError, "a shard is damaged"),
        (work.bug, KeyError, "nothing"),
        (work.reset, ConnectionResetError, "a network's file system"),
        (work.awkward, RuntimeError, "AwkwardError: this and that"),
        (work.unpicklable, RuntimeError, "CheckpointError: with a lock"),
        (work.killed, EngineError, r"was killed by SIGKILL.*pass a smaller --jobs"),
        (work.left, EngineError, r"ended with exit status 3"),
    ],
)
def test_an_error_of_one_process_stops_the_others(tmp_path, fail, kind, says):
    begin = time.monotonic()
    with pytest.raises(kind, match=says) as caught:
        list(Processes(2).map(partial(work.until_stopped, marks=tmp_path, fail=fail), [0, 1, 2], lambda _: None))
    assert time.monotonic() - begin < process_worker.LINGER  # nothing had to be killed
    assert (tmp_path / "1.stopped").exists() and not list(tmp_path.glob("2.*"))
    assert len(pids(tmp_path)) == 2 and not any(map(alive, pids(tmp_path)))
    error = caught.value
    assert type(error) is kind
    if fail is work.taken:
        assert error.__notes__ == ["Download it again."] and error.tensor == "q_proj"
    elif kind is not EngineError:
        assert f"in {fail.__name__}\n" in str(error.__cause__)


def test_a_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises(RuntimeError, match="a result cannot be pickled"):
        list(Processes(1).map(work.lock, [0], print))


class Enough(Exception):
    pass


def test_a_callback_that_raises_stops_the_processes(tmp_path):
    def progress(_):
        raise Enough

    with pytest.raises(Enough):
        list(Processes(2).map(partial(work.until_stopped, marks=tmp_path, fail=print), [1, 2], progress))
    assert {path.name for path in tmp_path.glob("*.stopped")} <= {"1.stopped", "2.stopped"}
    assert pids(tmp_path) and not any(map(alive, pids(tmp_path)))


def test_one_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LINGER", 0.2)

    def wait(*_):
        if len(pids(tmp_path)) == 2:
            raise Enough
        return []

    monkeypatch.setattr(processes, "wait", wait)
    with pytest.raises(Enough):
        list(Processes(2).map(partial(work.deaf, marks=tmp_path), [1, 2], print))
    assert not any(map(alive, pids(tmp_path)))


def test_a_map_that_nobody_reads_on_ends_its_processes():
    results = Processes(2).map(work.square, list(range(5)), lambda _: None)
    _, _, pid = next(results)
    assert alive(pid)
    results.close()
    assert not alive(pid)


PARENT = """
import sys
sys.path[:] = sys.argv[2:]
from functools import partial
from pathlib import Path
import work
from fp4cast.parallel.processes import Processes
list(Processes(2).map(partial(work.deaf, marks=Path(sys.argv[1])), [1, 2], print))
"""


def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, tmp_path, *sys.path])
    wait_for(lambda: len(pids(tmp_path)) == 2)
    assert all(map(alive, pids(tmp_path)))
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(map(alive, pids(tmp_path))), 2 * process_worker.LINGER)


def test_an_interpreter_that_cannot_be_started(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(EngineError, match=r"python: No such file.*FP4CAST_PROCESSES=0"):
        list(Processes(2).map(work.square, [1, 2], print))


GB = 1 << 30


@pytest.mark.parametrize(
    ("jobs", "sizes", "said", "expected"),
    [
        (4, [GB, GB], "", True),
        (3, [GB, GB], "", False),
        (16, [2 * GB], "", False),
        (16, [GB, GB - 1], "", False),
        (16, [], "1", False),
        (1, [1], "1", True),
        (16, [GB] * 9, "0", False),
    ],
)
def test_processes_are_for_large_work_and_many_jobs(monkeypatch, jobs, sizes, said, expected):
    monkeypatch.setenv(engines.SWITCH, said)
    monkeypatch.setattr(engines, "cores", lambda: 4)
    assert want_processes(jobs, sizes, int) is expected
    assert not (said == "" and want_processes(jobs, sizes, None))
    if said == "":
        for place, name, value in ((engines, "cores", lambda: 3), (sys, "executable", "")):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, value)
                assert not want_processes(jobs, sizes, int)


def test_the_local_engine_uses_either(monkeypatch):
    for said, here in (("0", True), ("1", False)):
        monkeypatch.setenv(engines.SWITCH, said)
        ((_, jobs, pid),) = Local(2).map(work.square, [1], lambda _: None)
        assert jobs == 2 and (pid == os.getpid()) is here
    monkeypatch.setenv(engines.SWITCH, "yes")
    with pytest.raises(UsageError, match="FP4CAST_PROCESSES must be 1"):
        list(Local(2).map(work.square, [1], print))
