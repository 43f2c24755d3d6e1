"""The points at which a conversion dies or the system fails it, and the processes that try them."""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
MEGABYTES = 150  # of the larger source, whose conversions are killed at random times
ANYTIME = "kill-anytime"

# name -> (kind in faults.c, errno, forever). EINTR for good is left out: Python itself tries again until it is over.
KINDS: dict[str, tuple[int, int, int]] = {
    "kill-before": (1, 0, 0),
    "kill-after": (2, 0, 0),
    "kill-halfway": (3, 0, 0),
    **{name: (4, getattr(errno, name), 0) for name in ("ENOSPC", "EIO", "EROFS", "EINTR")},
    **{f"{name}-forever": (4, getattr(errno, name), 1) for name in ("ENOSPC", "EIO", "EROFS")},
    "half": (5, 0, 0),
    "half-forever": (5, 0, 1),
    "zero": (6, 0, 0),
    "zero-forever": (6, 0, 1),
}
COUNTED = {"kill-halfway": 2, "half": 2, "half-forever": 2, "zero": 1, "zero-forever": 1}  # of how many bytes at least


class Unavailable(Exception):
    """This machine cannot preload a library; the message says why."""


class Point(NamedTuple):
    """A scenario, the number of a call (or, of `ANYTIME`, the thousandth of the time), and what happens there."""

    scenario: str
    call: int
    kind: str

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Point:
        """The point that `str` wrote."""
        scenario, call, kind = text.rsplit(":", 2)
        return cls(scenario, int(call), kind)


@dataclass(frozen=True)
class Result:
    """What became of a point.

    Attributes:
        point: the point.
        at: the call's name and path, or the time.
        found: the server's answer.
    """

    point: Point
    at: str
    found: dict[str, Any]

    @property
    def broken(self) -> list[str]:
        """What must not be so."""
        return self.found["broken"]

    def __str__(self) -> str:
        return f"{self.point} at {self.at}: {'; '.join(self.broken) or 'holds'}"


def build(directory: Path) -> Path:
    """Compile faults.c into a directory.

    Raises:
        Unavailable: no Linux, no compiler, or a C library that it does not fit.
    """
    if sys.platform != "linux":
        raise Unavailable(f"{sys.platform} has no LD_PRELOAD")
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    library = directory / "faults.so"
    command = [*compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "faults.c"), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"faults.c does not compile: {getattr(error, 'stderr', None) or error}") from error
    return library


class Server:
    """A process that tries points; `prelude` is Python that runs in it before the first."""

    def __init__(self, library: Path, work: Path, megabytes: int = MEGABYTES, prelude: str = "") -> None:
        code = f"from attacks.fault_server import World, serve\nworld = World.open()\n{prelude}\nserve(world)"
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # a fork keeps no other thread
        environment = {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(paths)} | one_thread
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(work), str(megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self._calls: dict[str, list[tuple[str, int, str]]] = {}

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server has ended with {self._process.wait()} at {request}")
        return json.loads(line)

    def calls(self, scenario: str) -> list[tuple[str, int, str]]:
        """The calls of an undisturbed run: name, 0 or whether it counts (several: 2) bytes, path."""
        if scenario not in self._calls:
            self._calls[scenario] = self._ask(scenario=scenario)["calls"]
        return self._calls[scenario]

    def points(self, scenario: str, kinds: Iterable[str] = KINDS) -> Iterator[Point]:
        """Every point of a scenario."""
        for kind in kinds:
            for call, (_, counts, _) in enumerate(self.calls(scenario), 1):
                if counts >= COUNTED.get(kind, 0):
                    yield Point(scenario, call, kind)

    def attempt(self, point: Point) -> Result:
        """What becomes of a point."""
        found = self._ask(scenario=point.scenario, call=point.call, fault=KINDS.get(point.kind))
        if point.kind == ANYTIME:
            return Result(point, f"{point.call / 10:.1f} % of the time", found)
        name, _, path = self.calls(point.scenario)[point.call - 1]
        return Result(point, f"{name} {path}", found)


def sample(points: Sequence[Point], number: int, seed: int) -> list[Point]:
    """Points at equal distances, so that every scenario and kind has its share."""
    if number >= len(points):
        return list(points)
    start = random.Random(seed).random()  # noqa: S311
    return [points[int((i + start) * len(points) / number)] for i in range(number)]


def anytime(scenarios: Sequence[str], number: int, seed: int) -> list[Point]:
    """Random times."""
    choose = random.Random(seed)  # noqa: S311
    return [Point(scenarios[i % len(scenarios)], choose.randrange(1, 1000), ANYTIME) for i in range(number)]


@contextmanager
def servers(work: Path, jobs: int, megabytes: int = MEGABYTES, prelude: str = "") -> Iterator[list[Server]]:
    """That many servers, each in its own directory.

    Raises:
        Unavailable: see `build`.
    """
    library = build(work)
    with ExitStack() as stack:
        directories = [work / str(i) for i in range(jobs)]
        for directory in directories:
            directory.mkdir()
        yield [stack.enter_context(Server(library, each, megabytes, prelude)) for each in directories]


def attempt_all(workers: Iterable[Server], points: Sequence[Point]) -> Iterator[Result]:
    """What becomes of points, in their order."""
    free: SimpleQueue[Server] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def attempt(point: Point) -> Result:
        worker = free.get()
        try:
            return worker.attempt(point)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(free.qsize()) as pool:
        yield from pool.map(attempt, points)
