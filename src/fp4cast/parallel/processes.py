"""Processes of this machine, each with its own interpreter and some of the threads; they end with the map.

A child is a new interpreter, not a fork: this process has threads. Work, items and results are pickled and go through a
socket that is the child's standard input and output. Where the socket ends, so does the child.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

from fp4cast.errors import EngineError, Fp4CastError
from fp4cast.parallel.process_worker import LINGER, Report
from fp4cast.parallel.progress import Advance, ignore
from fp4cast.parallel.ranges import largest_first
from fp4cast.parallel.workers import Workers

# Not -m, which would look for modules in the working directory first.
_BEGIN = "import sys; sys.path[:] = sys.argv[1:]; from fp4cast.parallel.process_worker import main; main()"
_LOOK_SECONDS = 0.5  # between two checks for Ctrl-C

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """As many processes as there are items or jobs, which share the threads; the last items share those of all.

    Attributes:
        jobs: threads of all processes.
        most: processes, at most.
    """

    jobs: int
    most: int = sys.maxsize

    def map(
        self,
        work: Callable[[Item, Workers], Result],
        items: Sequence[Item],
        progress: Advance,
        second: Advance = ignore,
        *,
        nbytes: Callable[[Item], int] | None = None,
    ) -> Iterator[Result]:
        """See `engines.Engine`; the largest items come first.

        Raises:
            EngineError: a process was killed, or cannot be started.
        """
        many = min(self.jobs, self.most, len(items))
        with _children(many) as children:
            threads = _shares(self.jobs, many, len(items))
            run = _Run(items, deque(zip(largest_first(items, nbytes), threads, strict=True)), progress, second)
            for child in children:
                child.send(work)
            for child in children:
                run.give(child)
            for number in range(len(items)):
                while number not in run.results:
                    run.look()
                yield run.results.pop(number)


def _shares(jobs: int, many: int, items: int) -> list[int]:
    """The threads of each item, in the order in which they are begun.

    >>> _shares(4, 4, 6), _shares(7, 3, 3)
    ([1, 1, 1, 1, 2, 2], [3, 2, 2])
    """
    full = items - items % many
    rounds = [many] * full + [items - full] * (items - full)  # how many are worked on together
    return [jobs // together + (i % many < jobs % together) for i, together in enumerate(rounds)]


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    connection: Connection

    def send(self, what: object) -> None:
        try:
            self.connection.send_bytes(pickle.dumps(what, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise self.lost() from error

    def receive(self) -> Report:
        try:
            report: Report = pickle.loads(self.connection.recv_bytes())  # noqa: S301  # from a process of our own
        except (EOFError, OSError) as error:
            raise self.lost() from error
        return report

    def lost(self) -> EngineError:
        """What to say of a process that ended before it was told to."""
        try:
            status = self.process.wait(LINGER)
        except subprocess.TimeoutExpired:
            return EngineError(f"the worker process {self.process.pid} speaks no more; run the same command again")
        try:
            how = f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            how = f"ended with exit status {status}"
        return EngineError(
            f"the worker process {self.process.pid} {how}. If the system ran out of memory, pass a smaller --jobs; "
            "the same command goes on with what is finished"
        )


@dataclass
class _Run:
    """A map that is running.

    Attributes:
        items: the items.
        waiting: the numbers of those that nobody has begun, and their threads.
        progress: see `engines.Engine`.
        second: see `engines.Engine`.
        busy: who works on which.
        results: of the items that are done, by number, until they are taken.
    """

    items: Sequence[Any]
    waiting: deque[tuple[int, int]]
    progress: Advance
    second: Advance
    busy: dict[Connection, tuple[_Child, int]] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)

    def give(self, child: _Child) -> None:
        """Send a free process the next item, if there is one."""
        if self.waiting:
            number, threads = self.waiting.popleft()
            self.busy[child.connection] = child, number
            child.send((threads, self.items[number]))

    def look(self) -> None:
        """Wait for news and take them; by itself now and then, as the kernel may hand a signal to another thread."""
        for connection in wait(list(self.busy), _LOOK_SECONDS):
            child, number = self.busy[connection]  # type: ignore[index]  # `wait` takes sockets, too
            report = child.receive()
            for count, advance in ((report.done, self.progress), (report.second, self.second)):
                if count:
                    advance(count)
            if report.error is not None:
                raise report.error from _cause(report)
            if report.finished:
                del self.busy[child.connection]
                self.results[number] = report.result
                self.give(child)


def _cause(report: Report) -> BaseException | None:
    """Where an error happened that nobody raised on purpose."""
    return None if isinstance(report.error, Fp4CastError) else RuntimeError(f"in a worker process:\n{report.trace}")


@contextmanager
def _children(many: int) -> Iterator[list[_Child]]:
    """Processes for a `with` block, after which there are none: what still works is stopped, and killed if need be."""
    children: list[_Child] = []
    try:
        for _ in range(many):
            children.append(_start())  # noqa: PERF401  # one by one: a later one may fail to start
        yield children
    finally:
        for child in children:
            child.connection.close()
        deadline = time.monotonic() + LINGER
        for child in children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def _start() -> _Child:
    path = [entry for entry in sys.path if isinstance(entry, str)]
    warnings = [f"-W{option}" for option in sys.warnoptions]
    try:
        ours, theirs = Pipe()
        try:
            with theirs, _without_interrupts():
                process = subprocess.Popen(  # noqa: S603  # this very interpreter
                    [sys.executable, *warnings, "-c", _BEGIN, *path],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    env={"OPENBLAS_NUM_THREADS": "1", **os.environ},  # NumPy would start a thread a core in each
                )
        except OSError:
            ours.close()
            raise
    except OSError as error:
        raise EngineError(
            f"no worker process can be started: {sys.executable}: {error.strerror}; set FP4CAST_PROCESSES=0 in the "
            "environment to work with threads alone"
        ) from error
    return _Child(process, ours)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let a new process begin with Ctrl-C held back, which is for this process alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
