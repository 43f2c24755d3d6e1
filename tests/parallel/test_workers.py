"""Workers keep the order, stop together, and leave nothing behind."""

import itertools
import sys
import threading
import time

import pytest

import fp4cast
from fp4cast.errors import MissingExtraError, UsageError
from fp4cast.parallel import workers as module
from fp4cast.parallel.workers import Stopped, Workers, workers


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_results_come_in_the_order_of_the_items(jobs):
    with workers(jobs) as pool:
        assert list(pool.map(lambda i: (time.sleep(0.001 * (i % 3)), i)[1], range(50))) == list(range(50))


def test_one_worker_is_the_callers_own_thread():
    with workers(1) as pool:
        assert set(pool.map(lambda _: threading.current_thread(), range(3))) == {threading.current_thread()}
    with workers(2) as pool:
        assert threading.current_thread() not in set(pool.map(lambda _: threading.current_thread(), range(3)))


def test_items_are_taken_as_they_are_needed():
    taken = []
    with workers(2) as pool:
        results = pool.map(lambda i: i, (taken.append(i) or i for i in itertools.count()))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        assert len(taken) < 30
        results.close()


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_the_first_error_stops_the_rest_and_is_the_one_that_is_raised(jobs):
    begun, finished = [], []

    def work(i):
        begun.append(i)
        if i == 1:
            time.sleep(0.02)
            raise ValueError("number one")
        for _ in range(1000):
            pool.advance(1)
            time.sleep(0.001)
        finished.append(i)

    start = time.monotonic()
    items = [1, 2, 3, 4, 5, 6] if jobs == 1 else [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="number one"), workers(jobs) as pool:
        list(pool.map(work, items))
    assert not finished
    assert len(begun) <= 2 * jobs
    assert time.monotonic() - start < 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


def test_ctrl_c_ends_the_threads():
    begun, stopped = [], []

    def work(i):
        begun.append(i)
        try:
            while True:
                pool.check()
                time.sleep(0.001)
        except Stopped:
            stopped.append(i)
            raise

    with pytest.raises(KeyboardInterrupt), workers(3) as pool:
        # As if the user pressed it while the main thread waits for the first result.
        pool._result = lambda _: (time.sleep(0.05), (_ for _ in ()).throw(KeyboardInterrupt))
        list(pool.map(work, range(100)))
    assert sorted(begun) == sorted(stopped) == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_lanes_share_the_workers_and_keep_the_order(jobs):
    threads, open_items, most = set(), set(), 0

    def piece(part):
        nonlocal most
        threads.add(threading.current_thread())
        open_items.add(part[0])
        most = max(most, len(open_items))
        time.sleep(0.002)
        return part

    def work(item):
        results = list(pool.map(piece, [(item, i) for i in range(10)]))
        open_items.discard(item)
        return results

    with workers(jobs) as pool:
        found = list(pool.map_outer(work, range(7)))
    assert found == [[(item, i) for i in range(10)] for item in range(7)]
    assert len(threads) <= jobs
    assert 1 < most <= jobs if jobs > 1 else most == 1
    if jobs == 1:
        assert threads == {threading.current_thread()}


@pytest.mark.parametrize("where", ["in a piece", "beside the pieces"])
def test_an_error_in_one_lane_stops_the_others(where):
    finished, others = [], threading.Event()

    def piece(item):
        if item == 2 and where == "in a piece":
            raise OSError("disk full")
        others.set()
        for _ in range(20_000):  # until the error: 20 seconds and more
            pool.advance(1)
            time.sleep(0.001)
        finished.append(item)

    def work(item):
        if item == 2 and where == "beside the pieces":
            others.wait(10)
            raise OSError("disk full")
        return list(pool.map(piece, [item] * (1 if where == "in a piece" else 3)))

    begin = time.monotonic()
    with pytest.raises(OSError, match="disk full"), workers(3) as pool:
        list(pool.map_outer(work, [0, 1, 2, 3]))
    assert not finished
    assert time.monotonic() - begin < 15
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


def test_a_lane_that_only_looks_whether_to_stop_does_not_hide_the_error():
    """As verification does while it measures the energy of a tensor."""

    def work(item):
        if item == 0:
            while True:
                pool.check()
                time.sleep(0.001)
        return list(pool.map(fail, [item]))

    def fail(_):
        time.sleep(0.02)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), workers(2) as pool:
        list(pool.map_outer(work, [0, 1]))


def test_a_map_that_fails_leaves_no_task_behind():
    """Its caller closes the files that they use."""
    running = set()

    def work(i):
        if i == 0:
            time.sleep(0.02)
            raise OSError("disk full")
        running.add(i)
        try:
            while True:
                pool.check()
                time.sleep(0.05)
        finally:
            running.discard(i)

    with workers(4) as pool, pytest.raises(OSError, match="disk full"):
        try:
            list(pool.map(work, range(20)))
        finally:
            assert not running


@pytest.mark.parametrize(("jobs", "lanes"), [(4, 3), (8, 5), (16, 9), (2, 2), (3, 1)])
def test_lanes_leave_no_worker_idle(jobs, lanes):
    with workers(jobs) as pool:
        pool._maps = lanes
        assert pool._share() * lanes >= jobs


def test_jobs_are_limited_by_what_the_process_may_use(monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 3)
    assert Workers().jobs == 3
    monkeypatch.setattr(module, "cores", lambda: 200)
    assert Workers().jobs == module.MAX_DEFAULT_JOBS
    assert Workers(40).jobs == 40
    with pytest.raises(UsageError, match="at least 1"):
        Workers(0)


def test_ray_that_is_not_installed_is_said_at_once(miniatures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fp4cast\[ray\]'"):
        fp4cast.convert(miniatures["moe"], tmp_path / "dst", engine="ray")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="unknown engine 'slurm'"):
        fp4cast.verify(miniatures["moe"], tmp_path, engine="slurm")
