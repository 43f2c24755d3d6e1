"""Progress of long work: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

LOG = logging.getLogger(__name__)
_PHASES = {
    "scan": "reading scales",
    "download": "downloading",
    "calibrate": "calibrating",
    "layers": "calibrating",
    "write": "writing",
    "check": "checking",
    "verify": "verifying",
}
_COUNTED = {"calibrate": "samples", "layers": "layers"}  # phases whose amounts are not bytes


def format_bytes(nbytes: float) -> str:
    """Format a size for people, in powers of 1000, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


class _Amount(DownloadColumn):
    """The amount done, in bytes or in the phase's own unit."""

    def render(self, task: Task) -> Text:
        if unit := task.fields.get("unit"):
            return Text(f"{task.completed:.0f}/{task.total or 0:.0f} {unit}", style="progress.download")
        return super().render(task)


class _Speed(TransferSpeedColumn):
    """Bytes per second; empty for a phase that does not count bytes."""

    def render(self, task: Task) -> Text:
        return Text("") if task.fields.get("unit") else super().render(task)


class Meter:
    """Progress of long work: bars on a terminal, a line now and then elsewhere. Called from worker threads."""

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self.console, self.every = console, every
        self.lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.begin: dict[str, float] = {}
        self.last = self.latest = time.monotonic()
        self.bars: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description:>14}"),
            BarColumn(),
            _Amount(),
            _Speed(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Meter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, phase: str, amount: int, total: int) -> None:
        """Add the amount just done in a phase, in bytes or in the phase's own unit."""
        with self.lock:
            if phase not in self.begin:
                LOG.info("%s: %s in all", _PHASES.get(phase, phase), self._amount(phase, total))
            self.begin.setdefault(phase, self.latest)  # a phase began at the previous phase's last report
            self.latest = time.monotonic()
            self.done[phase] += amount
            if self.console.is_terminal:
                if phase not in self.bars:
                    title = _PHASES.get(phase, phase)
                    self.bars[phase] = self.progress.add_task(title, total=total, unit=_COUNTED.get(phase))
                self.progress.update(self.bars[phase], completed=self.done[phase], total=total)
            elif time.monotonic() - self.last >= self.every:
                self.last = time.monotonic()
                self._line(phase, total)

    @staticmethod
    def _amount(phase: str, amount: int) -> str:
        return f"{amount} {_COUNTED[phase]}" if phase in _COUNTED else format_bytes(amount)

    def _line(self, phase: str, total: int) -> None:
        done = self.done[phase]
        rate = done / max(time.monotonic() - self.begin[phase], 1e-9)
        left = (total - done) / rate if rate else 0.0
        sizes = f"{format_bytes(done)} of {format_bytes(total)}, {format_bytes(rate)}/s"
        if unit := _COUNTED.get(phase):
            sizes = f"{done} of {total} {unit}"
        self.console.print(f"{_PHASES.get(phase, phase)}: {sizes}, {left:.0f} s left")


class Steps:
    """Like `Meter`, for work that is counted in steps."""

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self.console, self.every, self.last, self.done = console, every, time.monotonic(), 0
        columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.bar = self.progress.add_task("working", total=None)

    def __enter__(self) -> Steps:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, steps: int, total: int) -> None:
        """Add the steps just done."""
        self.done += steps
        self.progress.update(self.bar, completed=self.done, total=total)
        if not self.console.is_terminal and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self.console.print(f"{self.done} of {total} steps")
