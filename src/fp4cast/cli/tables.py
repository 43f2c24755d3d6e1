"""Tables that keep every name whole: as wide as they are in a pipe, and below each other where there is no room."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

PIPE = 10_000  # columns: nothing is folded where nobody reads it in columns
_GAP = 2


def width_of(console: Console) -> int | None:
    """The width to set for a console; None for rich's own choice."""
    return None if console.is_terminal or "COLUMNS" in os.environ else PIPE


def _folds(text: str, room: int) -> list[int]:
    """Where lines begin, but for the first: rich would cut words that are longer than a line."""
    begin, found = 0, []
    for word in re.finditer(r"\S+", text):
        if word.start() > begin and cell_len(text[begin : word.end()]) > room:
            begin = word.start()
            found.append(begin)
    return found


def show_wrapped(console: Console, name: str, text: str, indent: int) -> None:
    """Print a name and, from a column on, a text in markup: folded between words, never inside one."""
    whole = Text.from_markup(text, emoji=False)
    for number, line in enumerate(whole.divide(_folds(whole.plain, console.width - indent))):
        start = Text(("" if number else name).ljust(indent), style="dim")
        line.rstrip()
        console.print(start + line, soft_wrap=True)


def show_table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()
) -> None:
    """Print rows of cells in markup, one a line; where that is too wide, the first cell alone, the others below it.

    Args:
        console: where to.
        title: the line above.
        columns: their names.
        rows: a cell for each column.
        right: the columns of numbers.
    """
    cells, numeric = [list(row) for row in rows], set(right)
    widths = [
        max(cell_len(Text.from_markup(cell, emoji=False).plain) for cell in column)
        for column in zip(columns, *cells, strict=True)
    ]
    console.print(f"[italic]{title}[/]", soft_wrap=True)
    if sum(widths) + _GAP * (len(widths) - 1) > console.width:
        for first, *others in cells:
            console.print(first, soft_wrap=True)
            named = zip(columns[1:], others, strict=True)
            show_wrapped(console, "", ", ".join(f"{name} {cell}".strip() for name, cell in named), 4)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(column, justify="right" if number in numeric else "left", no_wrap=True, min_width=width)
    for row in cells:
        table.add_row(*row)
    console.print(table)
