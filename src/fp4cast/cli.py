"""The command line: arguments, progress, tables, exit codes. It only calls the library.

Exit status: 0 done and true; 1 it could not be done, or a check failed; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

import fp4cast
from fp4cast import parts
from fp4cast.demo import run_demo
from fp4cast.display import Meter, Steps, printable, show_demo, show_inspection, show_part, show_report
from fp4cast.errors import Fp4CastError, UsageError
from fp4cast.options import (
    Activations,
    Engine,
    Finish,
    Inexact,
    InputScales,
    Jobs,
    Json,
    Layout,
    Shards,
    Source,
    Where,
)

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn an MXFP4 LLM checkpoint into an NVFP4 one: exactly, at the speed of a file copy, and prove it.",
)


T = TypeVar("T")


def _say(as_json: bool) -> Console:
    """Where a person reads: stdout, or stderr when stdout is for a JSON document."""
    return Console(stderr=as_json, highlight=False)


def _fail(error: BaseException, as_json: bool, code: int) -> NoReturn:
    message = printable("\n".join([str(error), *getattr(error, "__notes__", ())]))
    if as_json:
        _print_json({"error": {"type": type(error).__name__, "message": message}})
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def _guarded(as_json: bool, work: Callable[[Any], T], meter_of: type[Meter | Steps] = Meter) -> T:
    """Do the work under a progress meter; turn the library's errors into messages and exit codes."""
    try:
        with meter_of(Console(stderr=True, highlight=False)) as meter:
            return work(meter)
    except UsageError as error:
        _fail(error, as_json, 2)
    except Fp4CastError as error:
        _fail(error, as_json, 1)
    except OSError as error:
        _fail(error, as_json, 1)
    except KeyboardInterrupt:
        _fail(
            KeyboardInterrupt(
                "interrupted; nothing half done is in place (convert: --resume goes on; a part: run it again)"
            ),
            as_json,
            130,
        )


def _print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fp4cast {fp4cast.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options before the command."""


@app.command()
def inspect(source: Source, jobs: Jobs = None, as_json: Json = False) -> None:
    """Say what SRC is and what a conversion would do: family, spreads, both windows, sizes. Writes nothing."""
    info = _guarded(
        as_json, lambda meter: fp4cast.inspect(source, jobs=jobs, progress=lambda n, total: meter("scan", n, total))
    )
    if as_json:
        _print_json(info.to_json())
    else:
        show_inspection(_say(as_json), info)


@app.command()
def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    layout: Annotated[Layout, typer.Option(help="How engines expect the tensors to be named.")] = Layout.modelopt,
    activations: Annotated[
        Activations | None, typer.Option(help="w4a4 needs --input-scales.", show_default="w4a16 where it can be served")
    ] = None,
    input_scales: InputScales = None,
    inexact: Annotated[
        Inexact, typer.Option(help="Where no tensor scale is exact: stop before writing, or write the nearest values.")
    ] = Inexact.fail,
    jobs: Jobs = None,
    engine: Where = Engine.local,
    shards: Shards = None,
    finish: Finish = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST, once the new one is complete.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read the result back.")] = False,
    as_json: Json = False,
) -> None:
    """Convert SRC into the NVFP4 checkpoint DST, and compare every value before DST appears."""
    options: dict[str, Any] = {
        "layout": layout.value,
        "activations": activations.value if activations else None,
        "input_scales": input_scales,
        "inexact": inexact.value,
        "jobs": jobs,
        "overwrite": overwrite,
    }
    _check_parts(shards, finish=finish, resume=resume, no_verify=no_verify, engine=engine, as_json=as_json)
    if shards is not None:
        part = _guarded(as_json, lambda meter: _part(source, destination, shards, progress=meter, **options))
        _print_json(part.to_json()) if as_json else show_part(_say(as_json), part)
        return
    options |= {"engine": engine.value, "verify": not no_verify}
    if finish:
        report = _guarded(as_json, lambda meter: parts.finish(source, destination, progress=meter, **options))
    else:
        report = _guarded(
            as_json, lambda meter: fp4cast.convert(source, destination, resume=resume, progress=meter, **options)
        )
    if as_json:
        _print_json(report.to_json())
    else:
        show_report(_say(as_json), report, "wrote")


def _part(source: str, destination: Path, shards: str, **options: Any) -> parts.Part:
    return parts.convert_part(source, destination, *parts.parse_part(shards), **options)


def _check_parts(
    shards: str | None, *, finish: bool, resume: bool, no_verify: bool, engine: Engine, as_json: bool
) -> None:
    """Refuse what cannot go together."""
    if shards is not None and no_verify:
        _fail(UsageError("parts are not verified; pass --no-verify to --finish"), as_json, 2)
    if shards is not None and finish:
        _fail(UsageError("--shards writes a part, --finish comes when all parts are written: pass one"), as_json, 2)
    if resume and (shards is not None or finish):
        _fail(UsageError("parts go on by themselves; --resume is for a conversion in one process"), as_json, 2)
    if shards is not None and engine is Engine.ray:
        _fail(UsageError("--shards and --engine ray are two ways to spread the work: pass one"), as_json, 2)


@app.command()
def verify(
    source: Source,
    destination: Annotated[str, typer.Argument(metavar="DST", help="The NVFP4 checkpoint: a directory or a model id.")],
    jobs: Jobs = None,
    engine: Where = Engine.local,
    as_json: Json = False,
) -> None:
    """Read SRC and DST and compare every value; say what differs, where and by how much."""
    report = _guarded(
        as_json,
        lambda meter: fp4cast.verify(
            source,
            destination,
            jobs=jobs,
            engine=engine.value,
            progress=lambda n, total: meter("verify", n, total),
        ),
    )
    if as_json:
        _print_json(report.to_json())
    else:
        show_report(_say(as_json), report, "verified")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the checkpoints there.", show_default="thrown away")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a miniature of each family, inspect, cast and verify it: seconds, offline."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        _fail(UsageError(f"{out}: exists and is no empty directory"), as_json, 2)
    with tempfile.TemporaryDirectory(prefix="fp4cast-demo-") as scratch:
        rows = _guarded(as_json, lambda _: list(run_demo(out or Path(scratch))))
    exact = all(row["exact"] and row["flip_found"] for row in rows)
    if as_json:
        _print_json({"exact": exact, "families": rows})
    else:
        show_demo(_say(as_json), rows)
    if not exact:
        raise typer.Exit(1)


@app.command()
def study(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the page there: index.md, index.html, pictures, study.json."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only tensors of up to a million weights.")] = False,
    as_json: Json = False,
) -> None:
    """Compare every algorithm on every scenario: what is exact, what is lost, which claims hold. A minute or two."""
    from fp4cast.study import page, show, survey

    def work(steps: Steps) -> dict[str, Any]:
        if out is not None:
            page.check(out)
        document = survey.study(quick, steps)
        if out is not None:
            page.write(document, out)
        return document

    document = _guarded(as_json, work, Steps)
    _print_json(document) if as_json else show.show(_say(as_json), document, out)


def main() -> None:
    """Entry point."""
    app()
