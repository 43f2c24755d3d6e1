"""Progress of long work: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

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


def _bars(console: Console, kind: str) -> Progress | None:
    """The bars of that kind; None where there is no terminal, and rich need not be loaded for them."""
    if not console.is_terminal:
        return None
    from fp4cast.cli import bars

    made: Progress = getattr(bars, kind)(console)
    return made


class Meter:
    """Progress of long work: bars on a terminal, a line now and then elsewhere. Called from worker threads."""

    def __init__(self, console: Console, every: float = 10.0) -> None:
        self.console, self.every = console, every
        self.lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.begin: dict[str, float] = {}
        self.last = self.latest = time.monotonic()
        self.bars: dict[str, TaskID] = {}
        self.progress = _bars(console, "bars_of_bytes")

    def __enter__(self) -> Meter:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def __call__(self, phase: str, amount: int, total: int) -> None:
        """Add the amount just done in a phase, in bytes or in the phase's own unit."""
        with self.lock:
            if phase not in self.begin:
                LOG.info("%s: %s in all", _PHASES.get(phase, phase), self._amount(phase, total))
            self.begin.setdefault(phase, self.latest)  # a phase began at the previous phase's last report
            self.latest = time.monotonic()
            self.done[phase] += amount
            if self.progress:
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
        self.progress = _bars(console, "bars_of_steps")
        self.bar = self.progress.add_task("working", total=None) if self.progress else None

    def __enter__(self) -> Steps:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def __call__(self, steps: int, total: int) -> None:
        """Add the steps just done."""
        self.done += steps
        if self.progress and self.bar is not None:
            self.progress.update(self.bar, completed=self.done, total=total)
        elif time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self.console.print(f"{self.done} of {total} steps")
