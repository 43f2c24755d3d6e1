"""Threads that end with the work that needs them: an error or Ctrl-C cancels what has not begun."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

from fp4cast.errors import UsageError

__all__ = ["Stopped", "Workers", "sliced", "workers"]


class Stopped(Exception):  # noqa: N818
    """Raised in a worker because another one failed, or the user asked to stop."""


class Workers(ThreadPoolExecutor):
    """A pool of threads whose tasks look now and then whether to go on.

    NumPy and the kernel do the work and release the GIL, so threads use all cores without copies or pickles.
    """

    def __init__(self, jobs: int | None) -> None:
        super().__init__(jobs or os.cpu_count() or 1)
        self.stop = Event()

    def check(self) -> None:
        """Called by tasks between steps.

        Raises:
            Stopped: the work has been given up.
        """
        if self.stop.is_set():
            raise Stopped


Item = TypeVar("Item")


def sliced(items: Sequence[Item], tasks: int = 512) -> list[Sequence[Item]]:
    """Items in some hundreds of runs: a future costs as much as a small tensor."""
    size = -(-len(items) // tasks)
    return [items[i : i + size] for i in range(0, len(items), size)] if items else []


@contextmanager
def workers(jobs: int | None) -> Iterator[Workers]:
    """A pool for a `with` block; when the block fails, waiting tasks are cancelled and running ones stop early."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs must be at least 1, got {jobs}")
    pool = Workers(jobs)
    try:
        yield pool
    except BaseException:
        pool.stop.set()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
