"""The command `study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fp4cast.cli.application import command
from fp4cast.cli.console import people_console, print_json, run_or_exit
from fp4cast.cli.options import DryRun, Json
from fp4cast.cli.preview import tell_preview
from fp4cast.cli.progress import Steps
from fp4cast.cli.tables import show_table
from fp4cast.conversion.preview import Preview


@command()
def study(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the page to DIR: index.md, index.html, pictures, study.json."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only tensors of up to a million weights.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare every algorithm on every scenario: what is exact, what is lost, which claims hold. Takes 1-2 minutes."""
    from fp4cast.study import page, show, survey

    if dry_run:
        if out is not None:
            run_or_exit(as_json, lambda _: page.check(out), only_looks=True)
        tell_preview(
            Preview(str(out or "nothing: there is no --out"), dict.fromkeys(page.FILES if out else ())), as_json
        )
        return

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
        show.show(people_console(as_json), document, out, show_table)
