"""The Ray engine on a real cluster of several nodes on this machine: the same bytes, also when workers are killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import fp4cast
from fp4cast.conversion import execute as executing
from fp4cast.errors import CheckpointError, EngineError
from fp4cast.parallel.ray_engine import Ray
from helpers import tree

ray = pytest.importorskip("ray", reason="pip install 'fp4cast[ray]'")
pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.ray,
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs and two nodes with two CPUs each: tasks run in processes of their own."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know this module
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=2)
    nodes.add_node(num_cpus=2)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["gpt-oss", "deepseek-v4"])
def test_ray_writes_the_same_bytes(miniatures, converted, tmp_path, kind):
    seen = []
    scales = {"activations": "w4a4", "input_scales": 1.0} if kind == "deepseek-v4" else {}
    report = fp4cast.convert(
        miniatures[kind], tmp_path / "dst", engine="ray", jobs=1, progress=lambda *call: seen.append(call), **scales
    )
    assert report.exact
    assert report.verified
    assert tree(tmp_path / "dst") == tree(converted[kind])
    for phase in ("write", "verify"):
        assert {sum(n for p, n, _ in seen if p == phase)} == {total for p, _, total in seen if p == phase}


def test_ray_finds_a_flipped_bit(miniatures, tmp_path):
    fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst")
    path = sorted((tmp_path / "dst").glob("*.safetensors"))[0]
    data = np.memmap(path, np.uint8, "r+")
    data[-1] ^= 1
    data.flush()
    assert len(fp4cast.verify(miniatures["gpt-oss"], tmp_path / "dst", engine="ray", jobs=1).differences) == 1


class DiesOnce:
    """Writes a shard, but its process is killed in the middle the first time."""

    def __init__(self, inner, marks):
        self.inner, self.marks = inner, marks

    def __call__(self, shard, pool):
        mark = self.marks / shard.file
        if shard.file.startswith("model-00001") and not mark.exists():
            mark.touch()
            report, done = pool._progress, 0

            def fatal(nbytes):
                nonlocal done
                report(nbytes)
                done += nbytes
                if done > shard.layout.size // 2:
                    os.kill(os.getpid(), signal.SIGKILL)

            pool._progress = fatal
        return self.inner(shard, pool)


def test_a_worker_killed_in_the_middle_of_a_shard_is_replaced(miniatures, converted, tmp_path, monkeypatch):
    finish = executing.FinishShard
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(executing, "FinishShard", lambda *args: DiesOnce(finish(*args), marks))
    report = fp4cast.convert(miniatures["gpt-oss"], tmp_path / "dst", engine="ray", jobs=1)
    assert report.exact
    assert [mark.name for mark in marks.iterdir()] == ["model-00001-of-00002.safetensors"]
    assert tree(tmp_path / "dst") == tree(converted["gpt-oss"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "marks"]


class WaitsOnNode:
    """Notes on which node it runs, and waits there until it is told to go on."""

    def __init__(self, directory):
        self.directory = directory

    def __call__(self, item, pool):
        (self.directory / f"{item}.{ray.get_runtime_context().get_node_id()}").touch()
        while not (self.directory / "go").exists():
            pool.advance(0)
            time.sleep(0.02)
        pool.advance(100)
        return item * item


def test_a_node_that_dies_has_its_work_done_elsewhere(cluster, tmp_path):
    extra = cluster.add_node(num_cpus=2, resources={"doomed": 1})
    results, progress = [], []
    work = threading.Thread(
        target=lambda: results.extend(Ray(jobs=2).map(WaitsOnNode(tmp_path), [1, 2, 3], progress.append))
    )
    work.start()
    wait_for(lambda: {path.name[0] for path in tmp_path.iterdir()} == {"1", "2", "3"})
    lost = {path.name[0] for path in tmp_path.iterdir() if path.name.endswith(extra.node_id)}
    assert len(lost) == 1
    cluster.remove_node(extra)
    (tmp_path / "go").touch()
    work.join(60)
    assert results == [1, 4, 9]
    assert sum(progress) == 300
    homes = [path.name for path in tmp_path.iterdir() if path.name[0] in lost]
    assert len(homes) == 2  # where it was lost, and where it was done


def test_an_error_in_one_task_stops_the_rest_with_its_message(tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    with pytest.raises(CheckpointError, match="item 1 is damaged") as error:
        list(Ray(jobs=1).map(FailsOnOne(calls), list(range(12)), lambda _: None))
    assert "all nodes must see SRC and DST" in error.value.__notes__[0]
    begun = len(list(calls.iterdir()))
    time.sleep(1)
    assert len(list(calls.iterdir())) == begun < 12


class FailsOnOne:
    """Fails on item 1; the others take long."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, item, pool):
        (self.calls / str(item)).touch()
        if item == 1:
            raise CheckpointError("item 1 is damaged")
        for _ in range(500):
            pool.advance(1)
            time.sleep(0.01)


def test_an_error_that_is_not_ours_is_told_as_one_of_the_cluster():
    with pytest.raises(EngineError, match=r"failed: ZeroDivisionError.*same version"):
        list(Ray(jobs=1).map(divide, [0], lambda _: None))


def divide(item, _):
    return 1 / item


def test_more_cpus_than_any_node_has():
    with pytest.raises(EngineError, match=r"asks for 64 CPUs.*the largest has 2 CPUs"):
        list(Ray(jobs=64).map(FailsOnOne(Path()), [0], lambda _: None))


# A driver of its own, with a Ray of its own, whose tasks would never end.
ENDLESS = """
import time
from fp4cast.conversion import execute as executing
from fp4cast.cli.app import main
class Endless:
    def __init__(self, inner):
        self.inner = inner
    def __call__(self, shard, pool):
        (self.inner.state / "begun").touch()
        while True:
            pool.advance(0)
            time.sleep(0.02)
finish = executing.FinishShard
executing.FinishShard = lambda *args: Endless(finish(*args))
main()
"""


def test_ctrl_c_leaves_no_destination_and_no_process(miniatures, tmp_path):
    def processes():
        found = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"FP4CAST_TEST={tmp_path}".encode() in path.read_bytes():
                    found.add(path.parent.name)
        return found

    command = [sys.executable, "-c", ENDLESS, "convert", miniatures["gpt-oss"], tmp_path / "dst", "--engine", "ray"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"FP4CAST_TEST": str(tmp_path), "RAY_ADDRESS": "local"}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / ".dst.fp4cast" / "begun").exists())
    assert len(processes()) > 2
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130, err
    assert "interrupted" in err
    wait_for(lambda: not processes())
    assert not (tmp_path / "dst").exists()
    assert not list(tmp_path.rglob("config.json"))
