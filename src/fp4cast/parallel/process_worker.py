"""A worker process: takes work and then items from its standard input, and reports what it did on its standard output.

What it prints goes to the standard error. It ends when its input does, in the middle of an item, too.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

from fp4cast.parallel.workers import Workers, workers

LINGER = 3.0  # seconds that a process has to end by itself
_EVERY = 0.05  # seconds between two reports of progress


class Report(NamedTuple):
    """What a worker process says.

    Attributes:
        done: bytes since the last report.
        second: likewise, of `Workers.second`.
        finished: it has done its item.
        result: what came of it.
        error: what stopped it.
        trace: where.
    """

    done: int
    second: int
    finished: bool = False
    result: Any = None
    error: BaseException | None = None
    trace: str = ""


class _Reporter:
    """Sums bytes and sends them now and then; threads share it."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._done = self._second = 0
        self._told = time.monotonic()

    def first(self, nbytes: int, second: int = 0) -> None:
        with self._lock:
            self._done += nbytes
            self._second += second
            if time.monotonic() - self._told >= _EVERY:
                self._send()

    def second(self, nbytes: int) -> None:
        self.first(0, nbytes)

    def end(self, **outcome: Any) -> None:
        """Report the end of an item; an outcome that cannot be pickled is an error."""
        with self._lock:
            try:
                self._send(**outcome)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                self._send(error=RuntimeError(f"a result cannot be pickled: {error}"))

    def _send(self, **outcome: Any) -> None:
        report = Report(self._done, self._second, **outcome)
        self._connection.send_bytes(pickle.dumps(report, pickle.HIGHEST_PROTOCOL))
        self._done = self._second = 0
        self._told = time.monotonic()


def main() -> None:
    """Work until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    connection, frames, stop = _take_over(), SimpleQueue[bytes | None](), threading.Event()
    threading.Thread(target=_read, args=(connection, frames, stop), daemon=True).start()
    reporter = _Reporter(connection)
    with contextlib.suppress(ConnectionError):  # nobody listens any more
        if (begin := frames.get()) is not None:
            work = pickle.loads(begin)  # noqa: S301  # from the process that started this one
            while (frame := frames.get()) is not None:
                _perform(work, frame, reporter, stop)


def _take_over() -> Connection:
    """The connection that is the standard input and output; others who print or read do not disturb it."""
    connection, nothing = Connection(os.dup(0)), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    try:
        os.dup2(2, 1)
    except OSError:  # it is closed
        os.dup2(nothing, 1)
    os.close(nothing)
    return connection


def _read(connection: Connection, frames: SimpleQueue[bytes | None], stop: threading.Event) -> None:
    """Take what comes; where no more does, stop the work, and the process where that does not help."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            frames.put(connection.recv_bytes())
    stop.set()
    frames.put(None)
    time.sleep(LINGER)
    os._exit(1)


def _perform(work: Callable[[Any, Workers], Any], frame: bytes, reporter: _Reporter, stop: threading.Event) -> None:
    try:
        jobs, item = pickle.loads(frame)  # noqa: S301
        with workers(jobs, reporter.first, stop, reporter.second) as pool:
            result = work(item, pool)
    except BaseException as error:
        reporter.end(error=portable(error), trace=traceback.format_exc())
    else:
        reporter.end(finished=True, result=result)


def portable(error: BaseException) -> BaseException:
    """An error as it arrives elsewhere, with its notes and attributes; one that does not is a RuntimeError."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):  # noqa: S301
            return error
    except Exception:  # noqa: S110  # classes may fail in any way
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
