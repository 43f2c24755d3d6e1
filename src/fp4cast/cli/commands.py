"""The group of all commands. A command is imported when it is run: a start is not slower for what it does not do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from fp4cast.cli.console import exit_with
from fp4cast.errors import UsageError

# Each command in the order of their list: the module that defines it under its name, and the first words of its help.
COMMANDS = {
    "inspect": (
        "inspect_command",
        "Say what SRC is and what a conversion would do: family, spreads, both windows, sizes. Writes nothing.",
    ),
    "convert": (
        "convert_command",
        "Convert SRC into the NVFP4 checkpoint DST, or back, and compare every value before DST is published.",
    ),
    "verify": (
        "verify_command",
        "Read SRC and DST and compare every value; say what differs, where and by how much.",
    ),
    "env": (
        "env_command",
        "Say what a bug report should: versions, the compiled kernel, extras, engines, GPUs.",
    ),
    "demo": (
        "demo_command",
        "Make a miniature of each family, then inspect, cast and verify it. Takes seconds, offline.",
    ),
    "study": (
        "study_command",
        "Compare every algorithm on every scenario: what is exact, what is lost, which claims hold. Takes 1-2 minutes.",
    ),
    "card": (
        "card_command",
        "Compare DST with SRC, then write its model card anew: README.md, its picture, and the receipt.",
    ),
    "push": (
        "push_commands",
        "Upload DST to a repository on the Hub, once its files are seen to be what `convert` wrote.",
    ),
    "calibrate": (
        "model_commands",
        "Find the activation scales of an MXFP4 checkpoint for `convert --activations w4a4`. Needs torch.",
    ),
    "ptq": (
        "model_commands",
        "Load a model, quantize and calibrate it, cast its MXFP4 weights, and export it as NVFP4. Needs torch.",
    ),
}
_WRONG_USAGE: Any = typer.BadParameter.__mro__[1]  # UsageError of click, or of the copy that typer has of it


def hyphens(word: str) -> str:
    """The spelling that names are compared in: `--calib_size`, ModelOpt's, is `--calib-size`."""
    return word.replace("_", "-")


def _take_at_once(option: Any, kind: Any) -> None:
    """Let a parameter take a value that is what it has to be already.

    For any other, typer loads pydantic, which takes as long as all of typer.

    Args:
        option: click's parameter.
        kind: the annotation of the function's: `str`, `Path`, a Literal, or one of them and None.
    """
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    words = {word for each in kinds for word in get_args(each)}
    convert = option.process_value

    def process_value(context: Any, value: Any) -> Any:
        if value is None and not option.required:
            return None
        if isinstance(value, str):
            if str in kinds or value in words:
                return value
            if Path in kinds and not os.path.lexists(value):
                return Path(value)
        return convert(context, value)

    option.process_value = process_value


def _show_help(command: Any, ctx: Any) -> None:
    from fp4cast.cli.help import show_help  # with rich

    show_help(command, ctx)


class _Quick:
    """A command or the group of all.

    Attributes:
        kinds: the annotation of each parameter of its function, without `Annotated`.
    """

    kinds: Mapping[str, Any] = {}

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters."""
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for option in found:
            if "process_value" not in vars(option):
                _take_at_once(option, self.kinds.get(option.name))
        return found


class Helped(_Quick, TyperCommand):
    """A command with the help of `fp4cast.cli.help`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 # typer's boxes do not use it either
        """Print it."""
        _show_help(self, ctx)


class _Imported(Mapping[str, Any]):
    """The commands by their names, each imported when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        module, _ = COMMANDS[name]
        return getattr(import_module(f"fp4cast.cli.{module}"), name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(_Quick, TyperGroup):
    """The group of all commands, with such a help, too."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.commands: Any = _Imported()

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Print it."""
        _show_help(self, ctx)

    def main(self, *args: Any, **named: Any) -> Any:
        """Run the command line; wrong usage is what typer shows, or the one JSON document that `--json` asks for."""
        if "--json" not in (named.get("args") or sys.argv[1:]):
            return super().main(*args, **named)
        try:
            code = super().main(*args, **(named | {"standalone_mode": False}))
        except _WRONG_USAGE as error:
            message = getattr(error, "format_message", error.__str__)()
            try:
                exit_with(UsageError(message), True, 2)
            except typer.Exit as end:
                code = end.exit_code
        except typer.Abort:
            code = 1
        sys.exit(code or 0)
