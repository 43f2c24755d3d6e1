"""The study in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fp4cast.study.algorithms import TITLES

_STYLES = {"reproduced": "green", "corrected": "yellow", "refuted": "red"}


def _snr(result: dict[str, Any]) -> str:
    return "[green]exact[/]" if result["exact"] else f"{result['snr_db']:.1f}"


def show(console: Console, document: dict[str, Any], out: Path | None, show_table: Callable[..., None]) -> None:
    """Signal to noise of every scenario under every algorithm, then the claims."""
    rows = [
        (
            each["name"],
            str(each["spread"]),
            f"{each['outside']:,}",
            *map(_snr, (*each["algorithms"].values(), each["unscaled"])),
        )
        for each in document["scenarios"]
    ]
    columns = ("scenario", "spread", "outside", *TITLES, "S = 1")
    show_table(console, "signal to noise, dB", columns, rows, right=range(1, len(columns)))
    console.print()
    for claim in document["claims"]:
        style = _STYLES[claim["status"]]
        console.print(f"[{style}]{claim['status']}[/]  {escape(claim['claim'])}\n    [dim]{escape(claim['figure'])}[/]")
    for name, reason in document["left_out"].items():
        console.print(f"left out: {name} ({escape(reason)})")
    if out is not None:
        console.print(f"\nwrote {escape(str(out / 'index.html'))}")
