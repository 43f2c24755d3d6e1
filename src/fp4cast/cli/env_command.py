"""The command `env`."""

from __future__ import annotations

from fp4cast.cli.application import command
from fp4cast.cli.console import people_console, print_json
from fp4cast.cli.display import show_facts
from fp4cast.cli.environment import environment, rows
from fp4cast.cli.options import Json


@command()
def env(as_json: Json = False) -> None:
    """Say what a bug report should: versions, the compiled kernel, extras, engines, GPUs."""
    found = environment()
    if as_json:
        print_json(found)
    else:
        show_facts(people_console(as_json), f"fp4cast {found['fp4cast']}", rows(found))
