"""Upload files to a model repository on the Hub: private unless told otherwise, and never sent twice."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4cast.errors import DestinationError, UsageError
from fp4cast.hub.client import connection_error

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, to a token that may write."


@dataclass(frozen=True)
class Place:
    """A repository that will be written to.

    Attributes:
        name: ORG/NAME.
        public: everybody may see it, or will.
        files: how many it holds; None where it does not exist.
    """

    name: str
    public: bool
    files: int | None


def find_place(name: str, *, public: bool) -> Place:
    """Look at a repository, and whether the user may be able to write to it; nothing is changed.

    Args:
        name: ORG/NAME.
        public: the user wants everybody to see it.

    Raises:
        UsageError: the name is none, or the repository is public and the user has not said so.
        DestinationError: there is no valid token, or the Hub cannot be reached.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"--push: expected a repository, ORG/NAME, got {name[:200]!r}")
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not get_token():
        raise DestinationError(f"{name}: there is no token for the Hub. {_LOG_IN}")
    with _explaining(name):
        HfApi().whoami()
        try:
            found = HfApi().model_info(name)
        except RepositoryNotFoundError:
            return Place(name, public, None)
    if not found.private and not public:
        raise UsageError(f"{name}: exists and is public; pass --public to agree, or name another repository")
    return Place(name, not found.private, len(found.siblings or ()))


def upload(directory: Path, files: Sequence[str], place: Place) -> tuple[str, str]:
    """Upload files of a directory, and see that they are there.

    What an interrupted upload has brought is not sent again.

    Args:
        directory: where they lie.
        files: their paths there, and in the repository.
        place: the repository; it is made if need be.

    Returns:
        (the repository's page, the commit).

    Raises:
        DestinationError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explaining(place.name):
        page = api.create_repo(place.name, private=not place.public, exist_ok=True)
        api.upload_folder(  # for large folders, too: since huggingface_hub 2 there is no other function for them
            repo_id=place.name,
            folder_path=directory,
            allow_patterns=[glob.escape(file) for file in files],
            commit_message="Upload an NVFP4 checkpoint made by fp4cast",
        )
        there = api.model_info(place.name, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in there.siblings or ()}
    for file in files:
        size, there_size = (directory / file).stat().st_size, sizes.get(file, "no such file")
        if size != there_size:
            raise DestinationError(
                f"{place.name}/{file}: expected {size} bytes on the Hub, got {there_size}; push again"
            )
    return str(page), str(there.sha)


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """Turn the client's errors into a DestinationError that names the repository."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled, RuntimeError, connection_error()) as error:
        # The client wraps what went wrong with a file in a RuntimeError.
        why = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        answer: Any = getattr(why, "response", None)
        if isinstance(why, HfHubHTTPError) or answer is not None:
            hint = f" {_LOG_IN}" if answer is not None and answer.status_code in (401, 403) else ""
            raise DestinationError(f"{name}: the Hub refuses: {why}{hint}") from error
        if isinstance(why, (OfflineModeIsEnabled, connection_error())):
            said = str(why) or type(why).__name__
            raise DestinationError(f"{name}: the Hub cannot be reached: {said}. Push again to go on.") from error
        raise
