"""The command `card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypedDict

import typer

from fp4cast.cli.application import command
from fp4cast.cli.console import people_console, print_json, run_or_exit
from fp4cast.cli.display import show_report
from fp4cast.cli.options import DryRun, Jobs, Json, Source, SourceId
from fp4cast.cli.preview import look_ahead
from fp4cast.conversion.write_card import preview_card, write_card


class CardOptions(TypedDict):
    """The options of both functions below."""

    source_id: str | None
    overwrite: bool
    jobs: int | None


@command()
def card(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory that `convert` has made of SRC.")],
    source_id: SourceId = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card that was edited.")] = False,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare DST with SRC, then write its model card anew: README.md, its picture, and the receipt."""
    how = CardOptions(source_id=source_id, overwrite=overwrite, jobs=jobs)
    if dry_run:
        look_ahead(as_json, lambda meter: preview_card(source, destination, **how, progress=meter))
        return
    report = run_or_exit(as_json, lambda meter: write_card(source, destination, **how, progress=meter))
    if as_json:
        print_json(report.to_json())
    else:
        show_report(people_console(as_json), report, "wrote the card of")
