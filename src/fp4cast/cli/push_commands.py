"""The command `push`, and what `convert --push` shares with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fp4cast.cli.application import command
from fp4cast.cli.consent import agree_to_push
from fp4cast.cli.console import people_console, print_json, run_or_exit
from fp4cast.cli.display import show_facts
from fp4cast.cli.options import DryRun, Jobs, Json, Yes
from fp4cast.cli.preview import tell_preview
from fp4cast.cli.progress import Meter, format_bytes
from fp4cast.conversion.preview import Preview
from fp4cast.conversion.push import Pushed, files_to_push
from fp4cast.conversion.push import push as push_destination
from fp4cast.errors import Fp4CastError
from fp4cast.hub.upload import Place


@command()
def push(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="What `convert` has written.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A repository on the Hub, made if need be.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it; otherwise it is private.")] = False,
    jobs: Jobs = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Upload DST to a repository on the Hub, once its files are seen to be what `convert` wrote.

    The same command goes on where an interrupted one has stopped.
    """
    files = run_or_exit(as_json, lambda _: files_to_push(destination), only_looks=True)
    if dry_run:
        tell_preview(Preview(repository, files, notes=["the Hub was not asked"]), as_json)
        return
    what = f"{destination}: {len(files)} files, {format_bytes(sum(files.values()))},"
    place = agree_to_push(repository, what, public=public, yes=yes, as_json=as_json)

    def work(meter: Meter) -> Pushed:
        return push_destination(destination, place, jobs=jobs, progress=lambda n, total: meter("check", n, total))

    done = run_or_exit(as_json, work)
    if as_json:
        print_json(done.to_json())
    else:
        show_pushed(people_console(as_json), done)


def push_to(place: Place, destination: Path, as_json: bool) -> Pushed:
    """Push what `convert` has just written."""

    def work(_: Meter) -> Pushed:
        try:
            return push_destination(destination, place, check=False)
        except (Fp4CastError, KeyboardInterrupt) as error:
            error.add_note(f"{destination} is complete: `fp4cast push {destination} {place.name}` goes on.")
            raise

    return run_or_exit(as_json, work, only_looks=True)


def show_pushed(console: Console, done: Pushed) -> None:
    """Print where a checkpoint is on the Hub."""
    rows = [
        ("files", f"{done.files} files, {format_bytes(done.bytes)}, in {done.seconds:.1f} s"),
        ("seen by", "everybody" if done.public else "you and your organisation: the repository is private"),
        ("commit", done.commit),
        ("next", f"fp4cast verify {done.repository} compares a download with the receipt"),
    ]
    show_facts(console, f"pushed {done.page}", rows)
