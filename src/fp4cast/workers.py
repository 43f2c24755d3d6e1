"""Threads that end with the work that needs them: an error or Ctrl-C cancels what has not begun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

__all__ = ["Stopped", "Workers", "workers"]


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


@contextmanager
def workers(jobs: int | None) -> Iterator[Workers]:
    """A pool for a `with` block; when the block fails, waiting tasks are cancelled and running ones stop early."""
    pool = Workers(jobs)
    try:
        yield pool
    except BaseException:
        pool.stop.set()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
