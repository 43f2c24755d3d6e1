"""Threads that end with the work that needs them: an error or Ctrl-C cancels the tasks that have not begun.

NumPy and the kernel do the work and release the GIL, so a few threads use their cores without copies or pickles; many
of them wait for the GIL, and `processes` shares large work among several.
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from typing import TypeVar

from fp4cast.errors import UsageError
from fp4cast.parallel.progress import Advance, ignore

MAX_DEFAULT_JOBS = 16  # more of them only queue for the disk; --jobs may ask for any number
_LOOK_SECONDS = 0.5  # between two checks for Ctrl-C
_MANY = 100  # a piece of so many tasks or more has tasks too small for threads

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):  # noqa: N818
    """Raised in a worker because another one failed, or the user asked to stop."""


def cores() -> int:
    """The processors that this process may use, as a scheduler or container limits them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs() -> int:
    """How many threads work where nobody says it."""
    return min(cores(), MAX_DEFAULT_JOBS)


@dataclass
class _State:
    """The maps that are running, and the first error of any."""

    maps: int = 0
    error: BaseException | None = None


class Workers:
    """A pool of threads; for one job, the caller's own thread, in which a debugger can step.

    Attributes:
        jobs: the number of threads.
    """

    def __init__(
        self,
        jobs: int | None = None,
        progress: Advance = ignore,
        stop: Event | None = None,
        second: Advance = ignore,
    ) -> None:
        if jobs is not None and jobs < 1:
            raise UsageError(f"jobs must be at least 1, got {jobs}")
        self.jobs = jobs or default_jobs()
        self._progress, self._second = progress, second
        self._threads = ThreadPoolExecutor(self.jobs) if self.jobs > 1 else None
        self._stop = stop or Event()
        self._lock = Lock()
        self._turn = Lock()
        self._state = _State()

    def check(self) -> None:
        """Raise if the work has been given up; tasks call this between steps.

        Raises:
            Stopped: the work has been given up.
        """
        if self._stop.is_set():
            raise Stopped

    def advance(self, nbytes: int) -> None:
        """Report bytes just done, and check; tasks call this."""
        self.check()
        self._progress(nbytes)

    @property
    def second(self) -> Workers:
        """The same threads, whose tasks report their bytes to the second of the two callbacks."""
        other = copy.copy(self)
        other._progress = self._second
        return other

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results in the order of the items, which are taken as they are needed.

        Raises:
            BaseException: the first error of any task; the others stop at their next step.
        """
        if self._threads is None:
            yield from map(work, items)
            return
        waiting: deque[Future[Result]] = deque()
        with self._sharing(waiting):
            for item in items:
                waiting.append(self._threads.submit(self._do, work, item))
                while len(waiting) >= self._share():
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())

    def map_outer(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Like `map`, for work that itself maps over these workers: as many items at a time as there are workers.

        The kernel lets one thread at a time write to a file, so workers should write to different files. The
        additional threads mostly wait.
        """
        try:
            with workers(min(self.jobs, max(1, len(items))), stop=self._stop) as waiters:
                yield from waiters.map(work, items)
        except Stopped:
            raise self._state.error or Stopped from None

    @contextmanager
    def _sharing(self, waiting: deque[Future[Result]]) -> Iterator[None]:
        """Count a running map; when it ends early, wait for its tasks, which may use files that the caller closes."""
        with self._lock:
            self._state.maps += 1
        try:
            yield
        except BaseException as error:
            if not isinstance(error, GeneratorExit):
                self._stop.set()
            for future in waiting:
                future.cancel()
            wait(waiting)
            raise
        finally:
            with self._lock:
                self._state.maps -= 1

    def _share(self) -> int:
        """How many tasks each running map may have submitted: one, or enough to keep all threads busy."""
        if self._state.maps >= self.jobs:
            return 1
        return 2 * -(-self.jobs // max(1, self._state.maps)) + 1

    def _do(self, work: Callable[[Item], Result], item: Item) -> Result:
        self.check()
        try:
            return work(item)
        except BaseException as error:
            with self._lock:
                self._state.error = self._state.error or error
            self._stop.set()
            raise

    def _result(self, future: Future[Result]) -> Result:
        try:
            # A signal that the kernel hands to another thread does not wake this one, so it wakes up by itself.
            while not wait([future], timeout=_LOOK_SECONDS).done:
                pass
            return future.result()
        except Stopped:
            raise self._state.error or Stopped from None

    @contextmanager
    def one_at_a_time_if_many(self, tasks: int) -> Iterator[None]:
        """Let one worker at a time run a piece of very many small tasks.

        Small tasks occupy the interpreter more than the kernel, and threads that take turns with it after each task
        take twice as long as one thread.
        """
        if tasks < _MANY:
            yield
            return
        with self._turn:
            self.check()
            yield

    def close(self, *, stop: bool) -> None:
        """Wait for the threads; with `stop`, drop waiting tasks and end running ones at their next step."""
        if stop:
            self._stop.set()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=stop)


@contextmanager
def workers(
    jobs: int | None = None, progress: Advance = ignore, stop: Event | None = None, second: Advance = ignore
) -> Iterator[Workers]:
    """Workers for a `with` block; when the block fails, waiting tasks are cancelled and running ones stop early.

    Args:
        jobs: the number of threads; None for one a core.
        progress: called by `advance`.
        stop: an event that stops them, where others share it.
        second: called by `second.advance`.
    """
    pool = Workers(jobs, progress, stop, second)
    try:
        yield pool
    except BaseException:
        pool.close(stop=True)
        raise
    pool.close(stop=False)
