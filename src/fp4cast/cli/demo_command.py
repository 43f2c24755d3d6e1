"""The command `demo`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fp4cast.cli.application import command
from fp4cast.cli.console import exit_with, people_console, print_json, run_or_exit
from fp4cast.cli.demo import run_demo
from fp4cast.cli.display import show_demo
from fp4cast.cli.options import DryRun, Json
from fp4cast.cli.preview import tell_preview
from fp4cast.conversion.preview import Preview
from fp4cast.errors import DestinationError
from fp4cast.miniatures import KINDS


@command()
def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the checkpoints in DIR.", show_default="thrown away")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a miniature of each family, then inspect, cast and verify it. Takes seconds, offline."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        exit_with(DestinationError(f"{out}: exists and is not an empty directory; name another one"), as_json, 1)
    if dry_run:
        names = [f"{kind}{ending}/" for kind in KINDS for ending in ("", "-NVFP4")]
        place = "a temporary directory, which is then deleted"
        tell_preview(Preview(str(out or place), dict.fromkeys(names)), as_json)
        return
    with tempfile.TemporaryDirectory(prefix="fp4cast-demo-") as scratch:
        rows = run_or_exit(as_json, lambda _: list(run_demo(out or Path(scratch))))
    exact = all(row["exact"] and row["flip_found"] for row in rows)
    if as_json:
        print_json({"exact": exact, "families": rows})
    else:
        show_demo(people_console(as_json), rows)
    if not exact:
        raise typer.Exit(1)
