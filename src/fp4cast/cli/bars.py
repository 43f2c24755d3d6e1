"""The bars of `fp4cast.cli.progress` on a terminal, which rich draws."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


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


def bars_of_bytes(console: Console) -> Progress:
    """Bars for `Meter`."""
    columns = (BarColumn(), _Amount(), _Speed(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description:>14}"), *columns, console=console)


def bars_of_steps(console: Console) -> Progress:
    """Bars for `Steps`."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description:>14}"), *columns, console=console)
