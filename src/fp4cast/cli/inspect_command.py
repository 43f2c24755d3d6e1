"""The command `inspect`."""

from __future__ import annotations

import fp4cast
from fp4cast.cli.application import command
from fp4cast.cli.console import people_console, print_json, run_or_exit
from fp4cast.cli.display import show_inspection
from fp4cast.cli.options import Jobs, Json, Source


@command()
def inspect(source: Source, jobs: Jobs = None, as_json: Json = False) -> None:
    """Say what SRC is and what a conversion would do: family, spreads, both windows, sizes. Writes nothing."""
    info = run_or_exit(
        as_json, lambda meter: fp4cast.inspect(source, jobs=jobs, progress=lambda n, total: meter("scan", n, total))
    )
    if as_json:
        print_json(info.to_json())
    else:
        show_inspection(people_console(as_json), info)
