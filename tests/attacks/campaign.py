"""Many inputs in processes of their own: a hang is killed, a crash is a finding, and the rest goes on."""

import multiprocessing
import os
import resource
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from attacks.judge import MEMORY_BYTES, SECONDS, Judge, Outcome, limit_memory
from attacks.mutate import Input, make_input
from attacks.starts import starts

_BATCH = 200  # inputs that a process gets at a time
_KILL_SECONDS = 6 * SECONDS  # the alarm reaches only Python's own code
_LOOK_SECONDS = 1.0  # between two looks whether a process is still there
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_PROCESSES = multiprocessing.get_context("fork")


@dataclass
class Finding:
    """What must not happen: how often it did, and the smallest number of an input with which it does."""

    command: str
    label: str
    detail: str
    number: int
    count: int = 1


@dataclass
class Figures:
    """What came of some inputs.

    Attributes:
        outcomes: how many, by (command, kind, label).
        findings: by (command, label).
        late: inputs that were refused only after something was written to the working directory, alike.
        slowest: (seconds, number, command) of the slowest input.
        rss_bytes: the largest resident set of any process.
    """

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    late: dict[tuple[str, str], Finding] = field(default_factory=dict)
    slowest: tuple[float, int, str] = (0.0, 0, "")
    rss_bytes: int = 0

    @property
    def inputs(self) -> int:
        """How many inputs these are of."""
        return self.outcomes.total()

    def note(self, number: int, command: str, outcome: Outcome) -> None:
        """Add one outcome."""
        self.outcomes[command, outcome.kind, outcome.label if outcome.kind != "finding" else ""] += 1
        self.slowest = max(self.slowest, (outcome.seconds, number, command))
        if outcome.kind == "finding":
            _merge(self.findings, Finding(command, outcome.label, outcome.detail, number))
        if outcome.late:
            _merge(self.late, Finding(command, outcome.late, outcome.detail, number))

    def add(self, other: "Figures") -> None:
        """Add the figures of other inputs."""
        self.outcomes += other.outcomes
        self.slowest, self.rss_bytes = max(self.slowest, other.slowest), max(self.rss_bytes, other.rss_bytes)
        for mine, theirs in ((self.findings, other.findings), (self.late, other.late)):
            for finding in theirs.values():
                _merge(mine, finding)


def _merge(table: dict[tuple[str, str], Finding], new: Finding) -> None:
    old = table.setdefault((new.command, new.label), new)
    if old is not new:
        first = min(old, new, key=lambda finding: finding.number)
        table[new.command, new.label] = replace(first, count=old.count + new.count)


class _Worker:
    """A process, the batch that it works on, and since when on which of its inputs."""

    def __init__(self, seed: int, root: Path) -> None:
        self.pipe, other = _PROCESSES.Pipe()
        self.number, self.since = _PROCESSES.Value("q", -1, lock=False), _PROCESSES.Value("d", 0.0, lock=False)
        self.batch: range = range(0)
        self.process = _PROCESSES.Process(target=_serve, args=(other, seed, root, self.number, self.since), daemon=True)
        self.process.start()
        other.close()

    def give(self, batch: range) -> None:
        """Let it work on a batch."""
        self.batch = batch
        self.since.value = time.monotonic()
        self.pipe.send(batch)

    def overdue(self) -> bool:
        """Whether it hangs where no alarm reaches it."""
        return bool(self.batch) and time.monotonic() - self.since.value > _KILL_SECONDS

    def end(self) -> None:
        """Stop it at once."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(
    pipe: Connection, seed: int, root: Path, number: "multiprocessing.sharedctypes.Synchronized[int]", since: object
) -> None:
    """Judge batch after batch, until the parent goes."""
    judge, parent = Judge(root), os.getppid()
    while True:
        while not pipe.poll(_LOOK_SECONDS):
            if os.getppid() != parent:
                return
        try:
            batch = pipe.recv()
        except EOFError:
            return
        limit_memory()  # again for every batch: what a process keeps for itself is not the inputs'
        figures = Figures()
        for each in batch:
            number.value, since.value = each, time.monotonic()
            figures.note(each, *_judged(judge, seed, each))
        figures.rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        number.value = -1
        pipe.send(figures)


def _judged(judge: Judge, seed: int, number: int) -> tuple[str, Outcome]:
    """(the command, what came of it); a fault of this harness is a finding, too."""
    try:
        made = make_input(seed, number)
        return made.command, judge.judge(made)
    except Exception as error:
        return "harness", Outcome("finding", f"{type(error).__name__} in the harness", traceback.format_exc()[-400:])


def run(seed: int, numbers: range, jobs: int, progress: Callable[[Figures], None] = lambda _: None) -> Figures:
    """Judge the inputs of these numbers.

    Args:
        seed: of the inputs.
        numbers: which of them.
        jobs: processes.
        progress: called with all figures so far.
    """
    starts()  # once, for all processes
    todo = deque(numbers[at : at + _BATCH] for at in range(0, len(numbers), _BATCH))
    total = Figures()
    with scratch() as root, _crew(seed, root, min(jobs, len(todo))) as crew:
        while todo or any(worker.batch for worker in crew):
            for worker in crew:
                if todo and not worker.batch:
                    worker.give(todo.popleft())
            wait([worker.pipe for worker in crew if worker.batch], timeout=_LOOK_SECONDS)
            for at, worker in enumerate(crew):
                figures = _collect(worker, todo, seed)
                total.add(figures)
                if figures.inputs:
                    progress(total)
                if not worker.process.is_alive():
                    crew[at] = _Worker(seed, root / os.urandom(4).hex())
    return total


def _collect(worker: _Worker, todo: deque[range], seed: int) -> Figures:
    """What a worker has found; if it hangs or is gone, a finding, and the rest of its batch goes back."""
    try:
        if worker.pipe.poll():
            figures = worker.pipe.recv()
            worker.batch = range(0)
            return figures
        hangs = worker.overdue()
        if worker.process.is_alive() and not hangs:
            return Figures()
    except (EOFError, ConnectionError):
        hangs = False
    if not hangs:
        worker.process.join(_LOOK_SECONDS)
    worker.end()
    figures = Figures()
    if not worker.batch:
        return figures
    number = max(worker.number.value, worker.batch[0])
    label = "hangs outside of Python" if hangs else f"the process ends with {worker.process.exitcode}"
    figures.note(number, make_input(seed, number).command, Outcome("finding", label))
    at = worker.batch.index(number)
    todo.extend(part for part in (worker.batch[:at], worker.batch[at + 1 :]) if part)
    worker.batch = range(0)
    return figures


def judge_apart(made: Input, memory: int = MEMORY_BYTES) -> Outcome:
    """Judge one input in a process of its own, which may allocate `memory` bytes more than it has."""
    mine, other = _PROCESSES.Pipe()
    with scratch() as root:
        process = _PROCESSES.Process(target=_judge_one, args=(other, root / "one", made, memory), daemon=True)
        process.start()
        other.close()
        try:
            if mine.poll(_KILL_SECONDS):
                return mine.recv()
            return Outcome("finding", "hangs outside of Python")
        except EOFError:
            process.join()
            return Outcome("finding", f"the process ends with {process.exitcode}")
        finally:
            process.kill()
            process.join()


def _judge_one(pipe: Connection, root: Path, made: Input, memory: int) -> None:
    judge = Judge(root)
    limit_memory(memory)
    pipe.send(judge.judge(made))


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory, where there is one."""
    parent = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fp4cast-fuzz-", dir=parent) as root:
        yield Path(root)


@contextmanager
def _crew(seed: int, root: Path, jobs: int) -> Iterator[list[_Worker]]:
    crew = [_Worker(seed, root / str(at)) for at in range(jobs)]
    try:
        yield crew
    finally:
        for worker in crew:
            worker.end()


LIMITS = {"seconds": SECONDS, "address_space_bytes": MEMORY_BYTES}
