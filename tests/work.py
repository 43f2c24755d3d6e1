"""Work for processes of their own, which import it; it imports nothing large."""

import os
import signal
import sys
import threading
import time

from fp4cast.errors import CheckpointError


class TakenError(CheckpointError):
    """An error with an attribute that its constructor does not set."""


class AwkwardError(Exception):
    """An error that cannot be made from its `args`."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def square(item, pool):
    """Two callbacks, in many steps, from all threads."""
    print("what is printed breaks nothing", flush=True)
    sys.stdout.write("x" * 100_000)

    def step(_):
        pool.advance(item)
        pool.second.advance(2 * item)

    list(pool.map(step, range(100)))
    return item * item, pool.jobs, os.getpid()


def where(_item, _pool):
    import fp4cast

    return fp4cast.__file__, sys.path, os.environ.get("FP4CAST_TEST"), signal.getsignal(signal.SIGINT), sys.warnoptions


def until_stopped(item, pool, *, marks, fail):
    """Waits until it is stopped, and says so; the first item fails when the others have begun."""
    (marks / f"{item}.{os.getpid()}").touch()
    if item:
        try:
            while True:
                time.sleep(0.005)
                pool.advance(1)
        except BaseException:
            (marks / f"{item}.stopped").touch()
            raise
    while len(list(marks.iterdir())) < 2:
        time.sleep(0.005)
    fail()


def taken():
    error = TakenError("a shard is damaged")
    error.tensor = "q_proj"
    error.add_note("Download it again.")
    raise error


def awkward():
    raise AwkwardError("this", "that")


def bug():
    return {}["nothing"]


def reset():
    raise ConnectionResetError(104, "a network's file system")


def unpicklable():
    error = CheckpointError("with a lock")
    error.lock = threading.Lock()
    raise error


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def left():
    os._exit(3)


def lock(_item, _pool):
    return threading.Lock()


def deaf(item, _pool, *, marks):
    """Never looks whether it should stop."""
    (marks / f"{item}.{os.getpid()}").touch()
    time.sleep(100)
