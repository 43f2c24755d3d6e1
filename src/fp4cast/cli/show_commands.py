"""The commands that need no checkpoint of the user's: `demo` and `study`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from fp4cast.cli.console import exit_with, people_console, print_json, run_or_exit
from fp4cast.cli.demo import run_demo
from fp4cast.cli.display import show_demo
from fp4cast.cli.options import Json
from fp4cast.cli.progress import Steps
from fp4cast.errors import UsageError


def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the checkpoints in DIR.", show_default="thrown away")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a miniature of each family, then inspect, cast and verify it. Takes seconds, offline."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        exit_with(UsageError(f"{out}: exists and is not an empty directory"), as_json, 2)
    with tempfile.TemporaryDirectory(prefix="fp4cast-demo-") as scratch:
        rows = run_or_exit(as_json, lambda _: list(run_demo(out or Path(scratch))))
    exact = all(row["exact"] and row["flip_found"] for row in rows)
    if as_json:
        print_json({"exact": exact, "families": rows})
    else:
        show_demo(people_console(as_json), rows)
    if not exact:
        raise typer.Exit(1)


def study(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the page to DIR: index.md, index.html, pictures, study.json."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only tensors of up to a million weights.")] = False,
    as_json: Json = False,
) -> None:
    """Compare every algorithm on every scenario: what is exact, what is lost, which claims hold. Takes 1-2 minutes."""
    from fp4cast.study import page, show, survey

    def work(steps: Steps) -> dict[str, Any]:
        if out is not None:
            page.check(out)
        document = survey.study(quick, steps)
        if out is not None:
            page.write(document, out)
        return document

    document = run_or_exit(as_json, work, Steps)
    if as_json:
        print_json(document)
    else:
        show.show(people_console(as_json), document, out)
