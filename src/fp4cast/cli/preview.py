"""Print what a command would write, for `--dry-run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.markup import escape

from fp4cast.cli.console import people_console, print_json, run_or_exit
from fp4cast.cli.display import left_out_row, show_facts
from fp4cast.cli.progress import Meter, format_bytes
from fp4cast.cli.streams import printable

if TYPE_CHECKING:
    from fp4cast.conversion.preview import Preview

_SHOWN = 20


def look_ahead(as_json: bool, look: Callable[[Meter], Preview]) -> None:
    """End a command's `--dry-run`: find out what the command would write, and print it."""
    tell_preview(run_or_exit(as_json, look, only_looks=True), as_json)


def tell_preview(preview: Preview, as_json: bool) -> None:
    """Print a preview for people or for scripts."""
    if as_json:
        print_json(preview.to_json())
        return
    console, files = people_console(as_json), preview.files
    unknown = sum(size is None for size in files.values())
    beside = f", beside {unknown} whose sizes are not known before" if unknown else ""
    rows = [("files", f"{len(files)}, {format_bytes(preview.bytes)}{beside}")]
    if (exact := preview.facts.get("exact")) is not None:
        rows.append(("weights", "[green]exact[/]" if exact else "[yellow]not exact[/]"))
    for name, value in preview.facts.items():
        if isinstance(value, dict):
            rows.append((name.replace("_", " "), ", ".join(f"{amount:,} {key}" for key, amount in value.items())))
    rows += left_out_row(preview.left_out)
    show_facts(console, f"would write {preview.destination} (a dry run: nothing was written)", rows)
    for name, size in list(files.items())[:_SHOWN]:
        console.print(f"  {escape(printable(name))}  {'' if size is None else format_bytes(size)}", soft_wrap=True)
    if len(files) > _SHOWN:
        console.print(f"  and {len(files) - _SHOWN} more; --json lists all")
    for note in preview.notes:
        console.print(f"[yellow]note[/] {escape(printable(note))}", soft_wrap=True)
