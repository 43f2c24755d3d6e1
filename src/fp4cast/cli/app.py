"""The command line: arguments, progress, tables, exit codes. It only calls the library.

Exit status: 0 done and true; 1 it could not be done, or a check failed; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

import fp4cast
from fp4cast.cli import model_commands
from fp4cast.cli.console import fail, guarded, print_json, say
from fp4cast.cli.demo import run_demo
from fp4cast.cli.display import show_demo, show_inspection, show_part, show_report
from fp4cast.cli.options import (
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
from fp4cast.cli.progress import Steps
from fp4cast.conversion import job_array
from fp4cast.errors import UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn an MXFP4 LLM checkpoint into an NVFP4 one: exactly, at the speed of a file copy, and prove it.",
)


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
    info = guarded(
        as_json, lambda meter: fp4cast.inspect(source, jobs=jobs, progress=lambda n, total: meter("scan", n, total))
    )
    if as_json:
        print_json(info.to_json())
    else:
        show_inspection(say(as_json), info)


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
        part = guarded(as_json, lambda meter: _part(source, destination, shards, progress=meter, **options))
        print_json(part.to_json()) if as_json else show_part(say(as_json), part)
        return
    options |= {"engine": engine.value, "verify": not no_verify}
    if finish:
        report = guarded(as_json, lambda meter: job_array.finish(source, destination, progress=meter, **options))
    else:
        report = guarded(
            as_json, lambda meter: fp4cast.convert(source, destination, resume=resume, progress=meter, **options)
        )
    if as_json:
        print_json(report.to_json())
    else:
        show_report(say(as_json), report, "wrote")


def _part(source: str, destination: Path, shards: str, **options: Any) -> job_array.Part:
    return job_array.convert_part(source, destination, *job_array.parse_part(shards), **options)


def _check_parts(
    shards: str | None, *, finish: bool, resume: bool, no_verify: bool, engine: Engine, as_json: bool
) -> None:
    """Refuse what cannot go together."""
    if shards is not None and no_verify:
        fail(UsageError("parts are not verified; pass --no-verify to --finish"), as_json, 2)
    if shards is not None and finish:
        fail(UsageError("--shards writes a part, --finish comes when all parts are written: pass one"), as_json, 2)
    if resume and (shards is not None or finish):
        fail(UsageError("parts go on by themselves; --resume is for a conversion in one process"), as_json, 2)
    if shards is not None and engine is Engine.ray:
        fail(UsageError("--shards and --engine ray are two ways to spread the work: pass one"), as_json, 2)


@app.command()
def verify(
    source: Source,
    destination: Annotated[str, typer.Argument(metavar="DST", help="The NVFP4 checkpoint: a directory or a model id.")],
    jobs: Jobs = None,
    engine: Where = Engine.local,
    as_json: Json = False,
) -> None:
    """Read SRC and DST and compare every value; say what differs, where and by how much."""
    report = guarded(
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
        print_json(report.to_json())
    else:
        show_report(say(as_json), report, "verified")
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
        fail(UsageError(f"{out}: exists and is no empty directory"), as_json, 2)
    with tempfile.TemporaryDirectory(prefix="fp4cast-demo-") as scratch:
        rows = guarded(as_json, lambda _: list(run_demo(out or Path(scratch))))
    exact = all(row["exact"] and row["flip_found"] for row in rows)
    if as_json:
        print_json({"exact": exact, "families": rows})
    else:
        show_demo(say(as_json), rows)
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

    document = guarded(as_json, work, Steps)
    print_json(document) if as_json else show.show(say(as_json), document, out)


app.command(**model_commands.ANY_SPELLING)(model_commands.calibrate)
app.command(**model_commands.ANY_SPELLING)(model_commands.ptq)


def main() -> None:
    """Entry point."""
    app()
