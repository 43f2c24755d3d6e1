"""The command `verify`."""

from __future__ import annotations

from typing import Annotated

import typer

import fp4cast
from fp4cast.cli.application import command
from fp4cast.cli.consent import agree_to_download
from fp4cast.cli.console import exit_unless, people_console, print_json, run_or_exit
from fp4cast.cli.display import show_files, show_report
from fp4cast.cli.options import Jobs, Json, Where, Yes
from fp4cast.parallel.engines import EngineName
from fp4cast.verification.files import verify_files


@command()
def verify(
    source: Annotated[str, typer.Argument(metavar="[SRC]", help="The MXFP4 checkpoint; without it, DST alone.")],
    destination: Annotated[
        str | None, typer.Argument(metavar="DST", help="The NVFP4 checkpoint: a directory or a model id.")
    ] = None,
    jobs: Jobs = None,
    engine: Where = "local",
    strict: Annotated[bool, typer.Option("--strict", help="A companion file that differs is a failure, too.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Read SRC and DST and compare every value; say what differs, where and by how much.

    With DST alone: compare the sizes and checksums of its files with its receipt, as after a copy.
    """
    agree_to_download([source, *([destination] if destination else [])], yes=yes, as_json=as_json)
    if destination is None:
        verify_copy(source, jobs, engine, strict=strict, as_json=as_json)
        return
    report = run_or_exit(
        as_json,
        lambda meter: fp4cast.verify(
            source,
            destination,
            jobs=jobs,
            engine=engine,
            strict=strict,
            progress=lambda n, total: meter("verify", n, total),
        ),
    )
    if as_json:
        print_json(report.to_json())
    else:
        show_report(people_console(as_json), report, "verified")
    exit_unless(report.ok, f"{destination}: differs from {source}", report.differences)


def verify_copy(destination: str, jobs: int | None, engine: EngineName, *, strict: bool, as_json: bool) -> None:
    """Run `verify DST`."""
    report = run_or_exit(
        as_json,
        lambda meter: verify_files(
            destination, jobs=jobs, engine=engine, strict=strict, progress=lambda n, total: meter("check", n, total)
        ),
    )
    if as_json:
        print_json(report.to_json())
    else:
        show_files(people_console(as_json), report)
    exit_unless(report.ok, f"{destination}: differs from its receipt", report.differences)
