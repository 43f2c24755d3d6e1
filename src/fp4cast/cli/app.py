"""The command line. It only calls the library.

Exit status: 0 done and true; 1 it could not be done, or a check failed; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import gc
import sys
from typing import Annotated

import typer

import fp4cast
from fp4cast.cli.commands import Commands, hyphens
from fp4cast.cli.console import DONE, finish_output
from fp4cast.cli.streams import open_streams

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn an MXFP4 LLM checkpoint into an NVFP4 one: exactly, at the speed of a file copy, and prove it.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fp4cast {fp4cast.__version__}")
        raise typer.Exit


@app.callback(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": hyphens})
def root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 # its callback acts
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options before the command."""
    DONE.command = context.invoked_subcommand or ""


def main() -> None:
    """Entry point."""
    output = open_streams()
    try:
        app()
    except SystemExit as end:  # how typer ends, always
        gc.freeze()  # the interpreter, which ends now, need not look for cycles in all that there is
        sys.exit(finish_output(output, int(end.code or 0)))
