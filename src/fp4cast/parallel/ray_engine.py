"""The Ray engine: each item of work is a task of a cluster whose nodes share a file system.

A task whose node or process dies runs again elsewhere; it writes under a name of its own and renames the result, so
running it twice does no harm. When a task fails, the others are cancelled.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fp4cast.errors import EngineError, Fp4CastError
from fp4cast.extras import require
from fp4cast.parallel.progress import Advance, ignore
from fp4cast.parallel.ranges import largest_first
from fp4cast.parallel.workers import Workers, workers

DEFAULT_JOBS = 4  # threads, and CPUs, of a task: copying needs no more
RETRIES = 5  # how often a task may lose its node
BASE_MEMORY, JOB_MEMORY = 300 << 20, 64 << 20  # bytes that a task asks of its node
_EVERY = 0.5  # seconds between two reports of progress

Item = TypeVar("Item")
Result = TypeVar("Result")


_Done = tuple[int, int]  # bytes, and those of `Workers.second`


class _Ledger:
    """An actor: how many bytes each item's latest attempt has done."""

    def __init__(self) -> None:
        self.done: dict[int, _Done] = {}

    def set(self, item: int, done: _Done) -> None:
        self.done[item] = done

    def get(self) -> dict[int, _Done]:
        return self.done


class _Reporter:
    """A task's side of the ledger: reports now and then, not for each tensor."""

    def __init__(self, ledger: Any, item: int) -> None:
        self.ledger, self.item = ledger, item
        self.done, self.told = (0, 0), time.monotonic()
        ledger.set.remote(item, self.done)

    def __call__(self, nbytes: int, second: int = 0) -> None:
        self.done = self.done[0] + nbytes, self.done[1] + second
        if time.monotonic() - self.told > _EVERY:
            self.told = time.monotonic()
            self.ledger.set.remote(self.item, self.done)


def _perform(
    work: Callable[[Item, Workers], Result], item: Item, number: int, jobs: int, ledger: Any
) -> tuple[Result, _Done]:
    """Run a task in a process of the cluster: (its result, the bytes that it has done)."""
    reporter = _Reporter(ledger, number)
    try:
        with workers(jobs, reporter, second=lambda n: reporter(0, n)) as pool:
            result = work(item, pool)
    except Exception as error:
        error.add_note(f"This happened on {socket.gethostname()}; all nodes must see SRC and DST under the same paths.")
        raise
    return result, reporter.done


@dataclass(frozen=True)
class Ray:
    """A Ray cluster: the one at RAY_ADDRESS, the one that this machine belongs to, or this machine alone.

    Attributes:
        jobs: threads of each task, and the CPUs that it reserves.
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
        """See `engines.Engine`; tasks run in any order, the largest first.

        Raises:
            EngineError: no node has the CPUs, or a task lost its node too often.
        """
        ray = require("ray", "ray")
        with _connected(ray):
            jobs = self._jobs(ray)
            ledger = ray.remote(num_cpus=0, max_restarts=-1)(_Ledger).remote()
            task = ray.remote(num_cpus=jobs, memory=_memory(jobs), max_retries=RETRIES, retry_exceptions=False)(
                _perform
            )
            pending: dict[Any, int] = {}
            with _cancelled(ray, pending):
                for i in largest_first(items, nbytes):
                    pending[task.remote(work, items[i], i, jobs, ledger)] = i
                results = _gather(ray, pending, ledger, progress, second)
        for i in range(len(items)):
            yield results[i]

    def _jobs(self, ray: Any) -> int:
        """The CPUs of each task; raises if no node has that many with their memory."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        jobs = self.jobs or max(1, min(DEFAULT_JOBS, most))
        if not any(node.get("CPU", 0) >= jobs and node.get("memory", 0) >= _memory(jobs) for node in nodes):
            raise EngineError(
                f"a task asks for {jobs} CPUs and {_memory(jobs) >> 20} MiB of memory, and none of the {len(nodes)} "
                f"nodes of the Ray cluster has both (the largest has {most} CPUs); pass a smaller --jobs"
            )
        return jobs


def _memory(jobs: int) -> int:
    return BASE_MEMORY + jobs * JOB_MEMORY


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Connect to a cluster for a `with` block; an existing connection is used and stays."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(f"no connection to the Ray cluster: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _gather(ray: Any, pending: dict[Any, int], ledger: Any, progress: Advance, second: Advance) -> dict[int, Any]:
    """Results by item, as they come."""
    results: dict[int, Any] = {}
    done: dict[int, _Done] = {}  # bytes by item: finished ones returned them, others last reported them
    reported = [0, 0]
    while pending:
        ready, _ = ray.wait(list(pending), timeout=_EVERY)
        said = _said(ray, ledger)
        done |= {item: said[item] for item in pending.values() if item in said}
        for reference in ready:
            item = pending.pop(reference)
            results[item], done[item] = _result(ray, reference)
        for which, advance in enumerate((progress, second)):
            total = sum(each[which] for each in done.values())
            advance(total - reported[which])
            reported[which] = total
    return results


@contextmanager
def _cancelled(ray: Any, pending: dict[Any, int]) -> Iterator[None]:
    """Cancel all tasks on the first error or Ctrl-C."""
    try:
        yield
    except BaseException:
        for reference in pending:
            ray.cancel(reference, force=True)
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=10)
        raise


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Fp4CastError | OSError):
            raise error.cause from None
        raise EngineError(
            f"a task of the Ray cluster failed: {error.cause!r}. Every node needs the same version of fp4cast."
        ) from error
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        raise EngineError(f"a task of the Ray cluster was lost {RETRIES + 1} times: {error}") from error
    except ray.exceptions.RayError as error:
        raise EngineError(f"a task of the Ray cluster could not be done: {error}") from error


def _said(ray: Any, ledger: Any) -> dict[int, _Done]:
    """The bytes that tasks last reported; none while the ledger's own node is being replaced."""
    try:
        return dict(ray.get(ledger.get.remote(), timeout=10))
    except ray.exceptions.RayError:
        return {}
