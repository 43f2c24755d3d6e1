"""What all commands have in common: their help, either spelling of names, `-q`, `-v` and `--log`."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any, get_args

import typer
from typer.core import TyperCommand

from fp4cast.cli.commands import Helped, hyphens
from fp4cast.cli.console import exit_with
from fp4cast.cli.options import Log, Quiet, Verbose
from fp4cast.cli.verbosity import asked
from fp4cast.errors import Fp4CastError, UsageError

_COMMON = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
    for name, kind, default in (("quiet", Quiet, False), ("verbose", Verbose, False), ("log", Log, None))
]


def command(cls: type[TyperCommand] = Helped) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the command of its name."""

    def take(function: Callable[..., Any]) -> Any:
        alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        run, settings = _with_common_options(function), {"token_normalize_func": hyphens}
        alone.command(cls=cls, context_settings=settings)(run)
        made: Any = typer.main.get_command(alone)
        made.kinds = {name: get_args(each)[0] for name, each in run.__annotations__.items()}
        return made

    return take


def _with_common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the options that every command has; Typer reads signatures."""

    @functools.wraps(function)
    def run(*, quiet: bool, verbose: bool, log: Any, **given: Any) -> None:
        gc.freeze()  # and back: what was loaded counts as old, and is not looked at at once
        gc.unfreeze()
        gc.enable()  # `fp4cast.cli.main` has disabled it
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
