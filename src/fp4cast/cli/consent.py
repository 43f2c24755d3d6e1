"""What is asked before it is done: large downloads, and uploads."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from fp4cast.cli.console import exit_with, people_console, run_or_exit
from fp4cast.cli.progress import format_bytes
from fp4cast.errors import UsageError
from fp4cast.hub.repository import Repository, look_up

if TYPE_CHECKING:
    from fp4cast.hub.upload import Place

ASK_BYTES = 1_000_000_000  # of a download, from which on the user is asked


def agree_to_download(sources: list[str], *, yes: bool, as_json: bool, streamed: bool = False) -> None:
    """Show how much a command would download, and ask where that is much; exit where the answer is no.

    Args:
        sources: what the user has named, models or directories.
        yes: the user has agreed beforehand.
        as_json: see `exit_with`.
        streamed: shard by shard, whatever the Hub cache holds.
    """
    found = run_or_exit(as_json, lambda _: [look_up(source) for source in sources], only_looks=True)
    for repository in filter(None, found):
        missing = repository.sizes() if streamed else repository.missing()
        if sum(missing.values()) >= ASK_BYTES:
            how = ", shard by shard: only a few are on the disk at a time" if streamed else ""
            agree(f"{_sizes(repository, missing)}{how}.", "Download that?", yes=yes, as_json=as_json)


def agree_to_push(name: str, what: str, *, public: bool, yes: bool, as_json: bool) -> Place:
    """Show where a command would upload something, and ask; exit where the answer is no.

    Args:
        name: the repository, ORG/NAME.
        what: what is uploaded.
        public: everybody may see it.
        yes: the user has agreed beforehand.
        as_json: see `exit_with`.
    """
    from fp4cast.hub.upload import find_place

    place = run_or_exit(as_json, lambda _: find_place(name, public=public), only_looks=True)
    kind = "public" if place.public else "private"
    there = (
        f"the new {kind} repository {name}"
        if place.files is None
        else f"the {kind} repository {name}, whose files of the same names would be replaced (it has {place.files})"
    )
    agree(f"{what} would be uploaded to {there}.", "Upload it?", yes=yes, as_json=as_json)
    return place


def _sizes(repository: Repository, missing: dict[str, int]) -> str:
    total = format_bytes(sum(stored.size for stored in repository.files.values()))
    here = len(repository.files) - len(missing)
    cached = f"; {here} of {len(repository.files)} files are in the Hub cache" if here else ""
    size = format_bytes(sum(missing.values()))
    return f"{repository}: {size} of {total} would be downloaded, in {len(missing)} files{cached}"


def agree(what: str, question: str, *, yes: bool, as_json: bool) -> None:
    """Say what a command would do, and ask; exit where the answer is no.

    Args:
        what: a sentence.
        question: asked on a terminal.
        yes: the user has agreed beforehand.
        as_json: see `exit_with`.
    """
    if yes:
        people_console(True).print(what, soft_wrap=True, markup=False)
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        exit_with(UsageError(f"{what} Pass --yes to agree; there is no terminal to ask on."), as_json, 2)
    if not typer.confirm(f"{what} {question}", err=True):
        exit_with(UsageError("nothing was done, as you wished"), as_json, 1)
