"""A model on the Hub at one commit: its files and their sizes, without any of their contents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fp4cast.checkpoints.directory import OTHER_FORMATS
from fp4cast.errors import CheckpointError
from fp4cast.hub.client import connection_error, explaining, patiently
from fp4cast.hub.resolve import in_cache, model_of


class Stored(NamedTuple):
    """A file of a repository.

    Attributes:
        size: its bytes.
        sha256: of its contents, where the Hub keeps it outside of git, as it does all weights; else empty.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Repository:
    """A model on the Hub, at one commit, so that nothing changes while it is read.

    Attributes:
        name: ORG/NAME.
        commit: the commit's hash.
        files: by path; copies of the weights in other formats are left out.
    """

    name: str
    commit: str
    files: Mapping[str, Stored]

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}"

    def url(self, file: str) -> str:
        """Where a file can be downloaded."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, file, revision=self.commit)

    def sizes(self) -> dict[str, int]:
        """The sizes of all files."""
        return {file: stored.size for file, stored in self.files.items()}

    def missing(self) -> dict[str, int]:
        """The sizes of the files that the Hub cache does not hold."""
        from huggingface_hub import try_to_load_from_cache

        cached = {file: try_to_load_from_cache(self.name, file, revision=self.commit) for file in self.files}
        return {file: stored.size for file, stored in self.files.items() if not isinstance(cached[file], str)}


def look_up(source: str | Path) -> Repository | None:
    """Ask the Hub for a model's files.

    Args:
        source: as in `resolve`.

    Returns:
        The repository; None where `source` is no model id, or the Hub cannot be reached or refuses, and its cache must
        do.

    Raises:
        CheckpointError: the Hub refuses, or its answer cannot be used.
    """
    model = model_of(source)
    if model is None:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def ask() -> Any:
        return HfApi().model_info(model[0], revision=model[1], files_metadata=True)

    with explaining(str(source)):
        try:
            info = patiently(str(source), ask, alone=True)
        except HfHubHTTPError:
            if in_cache(source) is None:
                raise
            return None
        except (OfflineModeIsEnabled, connection_error()):
            return None
    return Repository(model[0], str(info.sha), _files(str(source), info.siblings or ()))


def _files(source: str, siblings: Iterable[Any]) -> dict[str, Stored]:
    files: dict[str, Stored] = {}
    for sibling in siblings:
        name = str(sibling.rfilename)
        if any(fnmatch(name, pattern) for pattern in OTHER_FORMATS):
            continue
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or type(sibling.size) is not int:
            raise CheckpointError(f"{source}: lists a file {name[:200]!r} of {sibling.size} bytes, which is not usable")
        lfs = sibling.lfs
        files[name] = Stored(sibling.size, str(lfs.sha256) if lfs is not None else "")
    return files
