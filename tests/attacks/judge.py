"""Runs one input in this process and judges what comes of it.

Allowed are a success, and an Fp4CastError whose message names a file or directory of the input. Anything else is a
finding: another exception, a hang, memory beyond a bound, a message without a name or without end, a file written.
"""

import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import fp4cast
from attacks.files import holds, put, remove, snapshot
from attacks.mutate import SCALES, Input
from attacks.starts import Start, Tree
from fp4cast.errors import Fp4CastError

SECONDS = 5.0
_LEAST_SECONDS = 0.01
MEMORY_BYTES = 512 << 20  # address space beyond that of the process at its start
MESSAGE_CHARACTERS = 100_000
_SAMPLE = 20  # of so many inputs, the contents of one are compared, too
_NAMES = re.compile(r"'[^']*'|[\w.]*\d[\w.]*|\S+(?= is a shard| was not cast)")  # what varies in a message
_PACKAGE = str(Path(fp4cast.__file__).parent)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime",
}  # fmt: skip


class Hang(BaseException):
    """Raised where the program is, once its time is over."""


@dataclass(frozen=True)
class Outcome:
    """What came of an input.

    Attributes:
        kind: "success", "refusal" or "finding".
        label: what it is; equal for findings of the same cause.
        detail: for people.
        seconds: how long it took.
        late: the input was refused only after something was written to the working directory, and why.
    """

    kind: str
    label: str
    detail: str = ""
    seconds: float = 0.0
    late: str = ""


def limit_memory(nbytes: int = MEMORY_BYTES) -> None:
    """Let this process allocate so much more than it has now; more is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, resource.getrlimit(resource.RLIMIT_AS)[1])
    )


class Watch:
    """An audit hook that notes what is written while it is armed; no hook can be removed, so there is one a process."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.written: list[str] = []
        self._armed = False
        sys.addaudithook(self._see)

    @contextmanager
    def armed(self, allowed: str | None) -> Iterator[list[str]]:
        """What is written below any directory but the allowed one."""
        self.allowed, self.written, self._armed = allowed, [], True
        try:
            yield self.written
        finally:
            self._armed = False

    def _see(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._armed:
            return
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & _WRITES):
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, int):
            return
        text = os.fsdecode(path)  # type: ignore[arg-type]
        relative_to_open_directory = event in ("os.remove", "os.rmdir") and arguments[-1] != -1
        if not relative_to_open_directory and not (self.allowed and text.startswith(self.allowed)):
            self.written.append(f"{event} {text}")


class Judge:
    """A scratch directory, in which only what differs between two inputs is rewritten."""

    _watch: Watch | None = None

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        (self.root / "cwd").mkdir(parents=True)
        (self.root / "outside").write_text("secret")
        self._made: dict[tuple[str, str], Tree] = {}
        self._count = 0
        Judge._watch = Judge._watch or Watch()
        sys.dont_write_bytecode = True  # a module that is imported late

    def judge(self, made: Input) -> Outcome:
        """Write an input, run its command, and say what came of it; the scratch directory is then as before."""
        self._count += 1
        home = self.root / made.start.name
        changed = {side: self._write(home, made.start, side, tree) for side, tree in made.sides.items()}
        before = snapshot(self.root, home)
        try:
            outcome = self._run(made, home)
            fault = self._faults(made, home, outcome, before)
            outcome = fault or outcome
            return replace(outcome, detail=_short(outcome.detail.replace(f"{home}/", "")))
        finally:
            shutil.rmtree(home / "out", ignore_errors=True)
            for side, names in changed.items():
                self._restore(home, side, names)

    def _base(self, start: Start, side: str) -> Tree:
        return {"src": start.source, "dst": start.destination, "beside": {}}[side]

    def _write(self, home: Path, start: Start, side: str, tree: Tree) -> list[str]:
        """Write a side's tree; returns the names of what differs from the start's."""
        directory = home / side
        base = self._made.get((start.name, side))
        if base is None:
            directory.mkdir(parents=True)
            base = self._made[start.name, side] = self._base(start, side)
            for name, data in base.items():
                put(directory / name, data, self.root)
        changed = [name for name in {**base, **tree} if base.get(name) is not tree.get(name)]
        for name in changed:
            remove(directory / name)
            if name in tree:
                put(directory / name, tree[name], self.root)
        return changed

    def _restore(self, home: Path, side: str, names: list[str]) -> None:
        base = self._made[home.name, side]
        for name in names:
            remove(home / side / name)
            if name in base:
                put(home / side / name, base[name], self.root)

    def _run(self, made: Input, home: Path) -> Outcome:
        watch = Judge._watch
        assert watch is not None
        allowed = str(home / "out") if made.command == "convert" else None
        if allowed:
            (home / "out").mkdir()
        here = Path.cwd()
        os.chdir(self.root / "cwd")
        begin = time.monotonic()
        try:
            with alarm(SECONDS), watch.armed(allowed) as written:
                label = _command(made, home)
            outcome = Outcome("success", label, "", time.monotonic() - begin)
        except Fp4CastError as error:
            outcome = _refusal(error, home, time.monotonic() - begin)
        except (Exception, Hang) as error:
            outcome = Outcome("finding", where(error), repr(error), time.monotonic() - begin)
        finally:
            os.chdir(here)
        return Outcome("finding", f"writes: {made.command}", ", ".join(written)) if written else outcome

    def _faults(self, made: Input, home: Path, outcome: Outcome, before: dict[str, object]) -> Outcome | None:
        """What is wrong with the files after a run, if anything is."""
        if made.command == "convert" and outcome.kind != "success" and (home / "out" / "dst").exists():
            return Outcome("finding", "DST is there after an error", outcome.label)
        stage = home / "out" / ".dst.fp4cast"
        if stage.exists() and not outcome.late and outcome.kind != "finding":
            return Outcome("finding", "a working directory that no message names", outcome.label)
        shutil.rmtree(home / "out", ignore_errors=True)
        after = snapshot(self.root, home)
        if after != before:
            names = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
            return Outcome("finding", f"{made.command} changes files", ", ".join(names[:5]))
        if self._count % _SAMPLE == 0:
            for side, tree in made.sides.items():
                wrong = [name for name, data in tree.items() if not holds(home / side / name, data)]
                if wrong:
                    return Outcome("finding", f"{made.command} changes contents", ", ".join(wrong[:5]))
        return None


def _command(made: Input, home: Path) -> str:
    """Run the command; returns what its success is called."""
    if made.command == "inspect":
        fp4cast.inspect(home / "src", jobs=1).to_json()
        return "inspected"
    if made.command == "verify":
        report = fp4cast.verify(home / "src", home / "dst", jobs=1)
        report.to_json()
        return "equal" if report.ok else "differs"
    options = dict(made.options)
    if made.sides["beside"]:
        options["input_scales"] = home / "beside" / SCALES
    report = fp4cast.convert(home / "src", home / "out" / "dst", jobs=1, **options)
    return "exact" if report.exact else "rounded"


def _refusal(error: Fp4CastError, home: Path, seconds: float) -> Outcome:
    message, name = str(error), type(error).__name__
    if str(home) not in message:
        return Outcome("finding", f"names no file: {where(error)}", message, seconds)
    if len(message) > MESSAGE_CHARACTERS:
        return Outcome("finding", f"a message without end: {where(error)}", f"{len(message)} characters", seconds)
    named = str(home / "out" / ".dst.fp4cast") in " ".join([message, *getattr(error, "__notes__", ())])
    gist = _NAMES.sub("_", message.splitlines()[-1]).rpartition("/")[2] if named else ""
    return Outcome("refusal", name, message, seconds, gist and f"{name}: {gist[-150:]}")


def _short(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:300]} ... {text[-90:]}"


def where(error: BaseException) -> str:
    """An error's type and the last frames of the package that it passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_PACKAGE)]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-2:]]
    return f"{type(error).__name__} at {' > '.join(places)}"


def _starved() -> float:
    """Seconds that this thread could have run, but had to wait for a core; 0 where the system does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, LookupError):
        return 0.0


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the main thread when the time is over; a busy machine takes none of it."""
    begin = time.monotonic() - _starved()

    def ring(*_: int | FrameType | None) -> None:
        left = begin + seconds - (time.monotonic() - _starved())
        if left <= 0:
            raise Hang(f"longer than {seconds:g} s")
        signal.setitimer(signal.ITIMER_REAL, left + _LEAST_SECONDS)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
