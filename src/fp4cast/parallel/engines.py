"""Execution engines: local threads or Ray tasks. Results do not depend on the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar, get_args

from fp4cast.errors import UsageError
from fp4cast.extras import require
from fp4cast.parallel.progress import Advance
from fp4cast.parallel.workers import Workers, workers

EngineName = Literal["local", "ray"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs a function on each of some items."""

    @property
    def here(self) -> bool:
        """Whether it works in this process, so that what it calls may change the caller's objects."""

    def map(
        self, work: Callable[[Item, Workers], Result], items: Sequence[Item], progress: Advance
    ) -> Iterator[Result]:
        """Results in the order of the items.

        Args:
            work: called with an item and the workers that it may use. It and the items can be pickled, and running it
                twice does no harm.
            items: what to work on.
            progress: called with the number of bytes just done, maybe from other threads; the number is negative
                where work was lost and runs again.

        Raises:
            BaseException: the first error of any item; the other items are stopped.
        """


@dataclass(frozen=True)
class Local:
    """This process: as many items at a time as it has threads, which the items share."""

    jobs: int | None = None
    here: ClassVar[bool] = True

    def map(
        self, work: Callable[[Item, Workers], Result], items: Sequence[Item], progress: Advance
    ) -> Iterator[Result]:
        """See `Engine`."""
        with workers(self.jobs, progress) as pool:
            yield from pool.map_outer(lambda item: work(item, pool), items)


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
