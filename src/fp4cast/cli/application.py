"""What all commands have in common: their help, either spelling of names, `-q`, `-v` and `--log`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import typer

from fp4cast.cli.console import exit_with
from fp4cast.cli.help import Helped
from fp4cast.cli.options import Log, Quiet, Verbose
from fp4cast.cli.verbosity import asked
from fp4cast.errors import Fp4CastError, UsageError

_COMMON = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
    for name, kind, default in (("quiet", Quiet, False), ("verbose", Verbose, False), ("log", Log, None))
]


def hyphens(word: str) -> str:
    """The spelling that names are compared in: `--calib_size`, ModelOpt's, is `--calib-size`."""
    return word.replace("_", "-")


class Application(typer.Typer):
    """A Typer whose commands are alike."""

    def command(  # type: ignore[override] # Typer's many settings, as they come
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a command; arguments as for Typer."""
        register = super().command(
            name, **{"cls": Helped, "context_settings": {"token_normalize_func": hyphens}, **settings}
        )

        def take(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_common_options(function))
            return function

        return take


def _with_common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the options that every command has; Typer reads signatures."""

    @functools.wraps(function)
    def run(*, quiet: bool, verbose: bool, log: Any, **given: Any) -> None:
        as_json = bool(given.get("as_json"))
        if quiet and verbose:
            exit_with(UsageError("--quiet and --verbose contradict each other: pass one"), as_json, 2)
        try:
            with asked(quiet=quiet, verbose=verbose, log=log):
                function(**given)
        except Fp4CastError as error:
            exit_with(error, as_json, 1)

    own = inspect.signature(function, eval_str=True)
    every = [*own.parameters.values(), *_COMMON]
    run.__signature__ = own.replace(parameters=every)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in every}
    return run
