"""The command `convert`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from fp4cast.cli.application import command
from fp4cast.cli.consent import agree_to_download, agree_to_push
from fp4cast.cli.console import people_console, print_json, run_or_exit
from fp4cast.cli.display import show_part, show_report
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
from fp4cast.cli.usage import refuse_to_push, refuse_to_spread, refuse_to_stream, refuse_together
from fp4cast.conversion.convert import way_of
from fp4cast.conversion.plan import ConvertOptions
from fp4cast.verification.report import Report

if TYPE_CHECKING:
    from fp4cast.conversion.job_array import Part
    from fp4cast.conversion.preview import Preview
    from fp4cast.hub.upload import Place


class Rest(TypedDict):
    """The arguments of a conversion that do not decide its bytes."""

    jobs: int | None
    engine: str
    overwrite: bool
    verify: bool
    sync: bool


@command()
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
    """Convert SRC into the NVFP4 checkpoint DST, or back, and compare every value before DST is published.

    The same command goes on where an interrupted run has stopped.
    """
    refuse_together(shards, finish=finish, alone=resume or restart, read=not no_verify, engine=engine, as_json=as_json)
    refuse_to_stream(stream, spread=shards is not None or finish or engine == "ray", as_json=as_json)
    refuse_to_push(push, public=public, part=shards is not None, as_json=as_json)
    refuse_to_spread(source, destination, layout, as_json, shards=shards, finish=finish, stream=stream, push=push)
    what = (layout, activations, input_scales, inexact, kv_cache_qformat)
    options = ConvertOptions(*what, not no_card, source_id, to, fp8)
    if dry_run:
        how = {"shards": shards, "finish": finish, "restart": restart, "overwrite": overwrite, "jobs": jobs}
        look_ahead(as_json, partial(preview, source, destination, options, how))
        return
    agree_to_download([source], streamed=stream, yes=yes, as_json=as_json)
    place = agree_to_push(push, str(destination), public=public, yes=yes, as_json=as_json) if push else None
    if shards is not None:
        convert_part(source, destination, shards, options, jobs, overwrite=overwrite, sync=not no_sync, as_json=as_json)
        return
    rest = Rest(jobs=jobs, engine=engine, overwrite=overwrite, verify=not no_verify, sync=not no_sync)
    run = finish_parts if finish else partial(way_of(stream), resume=resume, restart=restart)
    report = run_or_exit(as_json, lambda meter: run(source, destination, options, progress=meter, **rest))
    end(report, place, destination, as_json)


def finish_parts(*what: Any, **how: Any) -> Report:
    """Run `convert --finish`."""
    from fp4cast.conversion import job_array

    return job_array.finish(*what, **how)


def preview(source: str, destination: Path, options: ConvertOptions, how: dict[str, Any], meter: Meter) -> Preview:
    """Say what would be written; `how` are more arguments of `preview_conversion`."""
    from fp4cast.conversion.preview import preview_conversion

    return preview_conversion(source, destination, options, **how, progress=meter)


def end(report: Report, place: Place | None, destination: Path, as_json: bool) -> None:
    """Push DST, if that was asked for, and say what was done."""
    pushed = None
    if place:
        from fp4cast.cli.push_commands import push_to, show_pushed

        pushed = push_to(place, destination, as_json)
    if as_json:
        print_json(report.to_json() | ({"pushed": pushed.to_json()} if pushed else {}))
        return
    show_report(people_console(as_json), report, "wrote")
    if pushed:
        show_pushed(people_console(as_json), pushed)


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
    from fp4cast.conversion import job_array

    def work(meter: Meter) -> Part:
        part, parts = job_array.parse_part(shards)
        return job_array.convert_part(
            source, destination, part, parts, options, jobs=jobs, overwrite=overwrite, sync=sync, progress=meter
        )

    part = run_or_exit(as_json, work)
    if as_json:
        print_json(part.to_json())
    else:
        show_part(people_console(as_json), part)
