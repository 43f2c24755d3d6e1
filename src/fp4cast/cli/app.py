"""The command line: arguments, progress, tables, exit codes. It only calls the library.

Exit status: 0 done and true; 1 it could not be done, or a check failed; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypedDict

import typer

import fp4cast
from fp4cast.cli import card_command, demo_command, model_commands, push_commands, study_command
from fp4cast.cli.application import Application, hyphens
from fp4cast.cli.consent import agree_to_download, agree_to_push
from fp4cast.cli.console import DONE, exit_unless, finish_output, people_console, print_json, run_or_exit
from fp4cast.cli.display import show_facts, show_files, show_inspection, show_part, show_report
from fp4cast.cli.environment import environment, rows
from fp4cast.cli.modelopt_options import PtqCommand
from fp4cast.cli.options import (
    ConvertLayoutOption,
    Destination,
    DryRun,
    Finish,
    Fp8Option,
    InexactOption,
    InputScales,
    Jobs,
    Json,
    KvCacheOption,
    NoCard,
    NoSync,
    NoVerify,
    OptionalActivations,
    Overwrite,
    Public,
    Push,
    Restart,
    Resume,
    Shards,
    Source,
    SourceId,
    Stream,
    To,
    Where,
    Yes,
)
from fp4cast.cli.preview import look_ahead
from fp4cast.cli.progress import Meter
from fp4cast.cli.streams import open_streams
from fp4cast.cli.usage import Commands, refuse_to_push, refuse_to_spread, refuse_to_stream, refuse_together
from fp4cast.conversion import job_array
from fp4cast.conversion.convert import convert_checkpoint
from fp4cast.conversion.plan import ConvertOptions
from fp4cast.conversion.preview import preview_conversion
from fp4cast.conversion.streaming import convert_streamed
from fp4cast.parallel.engines import EngineName
from fp4cast.verification.files import verify_files
from fp4cast.verification.report import Report

app = Application(
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


@app.command()
def inspect(source: Source, jobs: Jobs = None, as_json: Json = False) -> None:
    """Say what SRC is and what a conversion would do: family, spreads, both windows, sizes. Writes nothing."""
    info = run_or_exit(
        as_json, lambda meter: fp4cast.inspect(source, jobs=jobs, progress=lambda n, total: meter("scan", n, total))
    )
    if as_json:
        print_json(info.to_json())
    else:
        show_inspection(people_console(as_json), info)


class Rest(TypedDict):
    """The arguments of a conversion that do not decide its bytes."""

    jobs: int | None
    engine: str
    overwrite: bool
    verify: bool
    sync: bool


@app.command()
def convert(
    source: Source,
    destination: Destination,
    to: To = "nvfp4",
    layout: ConvertLayoutOption = "modelopt",
    activations: OptionalActivations = None,
    input_scales: InputScales = None,
    inexact: InexactOption = "fail",
    kv_cache_qformat: KvCacheOption = "none",
    fp8: Fp8Option = "none",
    jobs: Jobs = None,
    engine: Where = "local",
    shards: Shards = None,
    finish: Finish = False,
    resume: Resume = False,
    restart: Restart = False,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    no_sync: NoSync = False,
    no_card: NoCard = False,
    source_id: SourceId = None,
    stream: Stream = False,
    push: Push = None,
    public: Public = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Convert SRC into the NVFP4 checkpoint DST, and compare every value before DST is published.

    The same command goes on where an interrupted run has stopped.
    """
    refuse_together(shards, finish=finish, alone=resume or restart, read=not no_verify, engine=engine, as_json=as_json)
    refuse_to_stream(stream, spread=shards is not None or finish or engine == "ray", as_json=as_json)
    refuse_to_push(push, public=public, part=shards is not None, as_json=as_json)
    refuse_to_spread(source, destination, layout, as_json, shards=shards, finish=finish, stream=stream, push=push)
    what = (layout, activations, input_scales, inexact, kv_cache_qformat)
    options = ConvertOptions(*what, not no_card, source_id, to, fp8)
    if dry_run:
        preview = partial(preview_conversion, source, destination, options, shards=shards, finish=finish, jobs=jobs)
        look_ahead(as_json, lambda meter: preview(restart=restart, overwrite=overwrite, progress=meter))
        return
    agree_to_download([source], streamed=stream, yes=yes, as_json=as_json)
    place = agree_to_push(push, str(destination), public=public, yes=yes, as_json=as_json) if push else None
    if shards is not None:
        convert_part(source, destination, shards, options, jobs, overwrite=overwrite, sync=not no_sync, as_json=as_json)
        return
    rest = Rest(jobs=jobs, engine=engine, overwrite=overwrite, verify=not no_verify, sync=not no_sync)
    run: Callable[..., Report] = job_array.finish
    if not finish:
        run = partial(convert_streamed if stream else convert_checkpoint, resume=resume, restart=restart)
    report = run_or_exit(as_json, lambda meter: run(source, destination, options, progress=meter, **rest))
    push_commands.push_and_show(report, place, destination, as_json)


def convert_part(
    source: str,
    destination: Path,
    shards: str,
    options: ConvertOptions,
    jobs: int | None,
    *,
    overwrite: bool,
    sync: bool,
    as_json: bool,
) -> None:
    """Run `convert --shards I/N`."""

    def work(meter: Meter) -> job_array.Part:
        part, parts = job_array.parse_part(shards)
        return job_array.convert_part(
            source, destination, part, parts, options, jobs=jobs, overwrite=overwrite, sync=sync, progress=meter
        )

    part = run_or_exit(as_json, work)
    if as_json:
        print_json(part.to_json())
    else:
        show_part(people_console(as_json), part)


@app.command()
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
            source, destination, jobs=jobs, engine=engine, strict=strict, progress=partial(meter, "verify")
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


@app.command()
def env(as_json: Json = False) -> None:
    """Say what a bug report should: versions, the compiled kernel, extras, engines, GPUs."""
    found = environment()
    if as_json:
        print_json(found)
    else:
        show_facts(people_console(as_json), f"fp4cast {found['fp4cast']}", rows(found))


app.command()(demo_command.demo)
app.command()(study_command.study)
app.command()(card_command.card)
app.command()(push_commands.push)
app.command()(model_commands.calibrate)
app.command(cls=PtqCommand)(model_commands.ptq)


def main() -> None:
    """Entry point."""
    output = open_streams()
    try:
        app()
    except SystemExit as end:  # how typer ends, always
        sys.exit(finish_output(output, int(end.code or 0)))
