"""Execution engines: threads, processes, or Ray tasks. Results do not depend on the engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, get_args

from fp4cast.errors import UsageError
from fp4cast.extras import require
from fp4cast.parallel.progress import Advance, ignore
from fp4cast.parallel.workers import Workers, cores, default_jobs, workers

EngineName = Literal["local", "ray"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
SWITCH = "FP4CAST_PROCESSES"  # in the environment: 1 for processes, 0 for threads, whatever the work
_LEAST_JOBS = 4  # fewer threads seldom wait for each other's turn in the interpreter
_LEAST_BYTES = 2 << 30  # less is done before processes have paid for their start

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs a function on each of some items."""

    def map(
        self,
        work: Callable[[Item, Workers], Result],
        items: Sequence[Item],
        progress: Advance,
        second: Advance = ignore,
        *,
        nbytes: Callable[[Item], int] | None = None,
    ) -> Iterator[Result]:
        """Results in the order of the items.

        Args:
            work: called with an item and the workers that it may use. It, the items and the results can be pickled, and
                running it twice does no harm.
            items: what to work on.
            progress: called with the number of bytes just done, maybe from other threads; the number is negative
                where work was lost and runs again.
            second: likewise, with what is reported to `Workers.second`.
            nbytes: about how many bytes an item reads or writes; None where that is not known, or little.

        Raises:
            BaseException: the first error of any item; the other items are stopped.
        """


@dataclass(frozen=True)
class Threads:
    """This process: as many items at a time as it has threads, which the items share. Nothing is pickled."""

    jobs: int | None = None

    def map(
        self,
        work: Callable[[Item, Workers], Result],
        items: Sequence[Item],
        progress: Advance,
        second: Advance = ignore,
        *,
        nbytes: Callable[[Item], int] | None = None,  # noqa: ARG002  # threads share an item that is left over
    ) -> Iterator[Result]:
        """See `Engine`."""
        with workers(self.jobs, progress, second=second) as pool:
            yield from pool.map_outer(lambda item: work(item, pool), items)


@dataclass(frozen=True)
class Local:
    """This machine: processes where much work is shared by many, threads elsewhere.

    Threads hand the interpreter round after each step, and many of them spend their time with that.
    """

    jobs: int | None = None

    def map(
        self,
        work: Callable[[Item, Workers], Result],
        items: Sequence[Item],
        progress: Advance,
        second: Advance = ignore,
        *,
        nbytes: Callable[[Item], int] | None = None,
    ) -> Iterator[Result]:
        """See `Engine`.

        Raises:
            EngineError: a process was killed.
        """
        jobs = self.jobs or default_jobs()
        if want_processes(jobs, items, nbytes):
            from fp4cast.parallel.processes import Processes  # what it imports takes a while

            yield from Processes(jobs, cores()).map(work, items, progress, second, nbytes=nbytes)
        else:
            yield from Threads(jobs).map(work, items, progress, second)


def want_processes(jobs: int, items: Sequence[Item], nbytes: Callable[[Item], int] | None) -> bool:
    """Whether processes do some work sooner than threads, or the environment asks for them."""
    said = os.environ.get(SWITCH, "")
    if said not in ("", "0", "1"):
        raise UsageError(f"{SWITCH} must be 1 for processes, 0 for threads or empty for what suits, got {said!r}")
    if said or not items:
        return said == "1" and len(items) > 0
    if not sys.executable or getattr(sys, "frozen", False):
        return False  # this program cannot start another interpreter
    if nbytes is None or len(items) < 2 or min(jobs, cores()) < _LEAST_JOBS:
        return False
    return sum(map(nbytes, items)) >= _LEAST_BYTES


def make_engine(name: str, jobs: int | None) -> Engine:
    """The engine of that name.

    Raises:
        UsageError: there is none.
        MissingExtraError: it needs a package that is not installed.
    """
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise UsageError(f"jobs must be a whole number of at least 1, got {jobs!r}")
    if name == "local":
        return Local(jobs)
    if name == "ray":
        from fp4cast.parallel.ray_engine import Ray  # Ray is large and optional

        require("ray", "ray")
        return Ray(jobs)
    raise UsageError(f"unknown engine {name!r}; known are {', '.join(ENGINES)}")
