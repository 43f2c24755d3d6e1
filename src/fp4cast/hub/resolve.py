"""Resolve what a user names: a directory, or a model of the Hub, downloaded whole or found in its cache."""

from __future__ import annotations

from pathlib import Path

from fp4cast.checkpoints.byte_ranges import require_posix
from fp4cast.checkpoints.directory import OTHER_FORMATS
from fp4cast.checkpoints.instead import model_id
from fp4cast.errors import CheckpointError
from fp4cast.hub.client import explaining


def model_of(source: str | Path) -> tuple[str, str | None] | None:
    """(ORG/NAME, revision) of a model that is named; None where a path is, whether something is there or not.

    Args:
        source: see `resolve`.

    Raises:
        CheckpointError: it can be neither.
        PlatformError: this system cannot read it; nothing is downloaded in vain.
    """
    if not str(source).strip():
        raise CheckpointError("the checkpoint's name is empty; expected a directory or a model id, ORG/NAME")
    require_posix(Path(source))
    try:
        return None if Path(source).exists() else model_id(str(source))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(source)[:200]}: cannot be read: {error}") from error


def resolve(source: str | Path, *, download: bool = True) -> Path:
    """The directory of a checkpoint: the path itself, or a model downloaded (or found in the Hub cache).

    Args:
        source: a directory, a model id (`ORG/NAME`, `ORG/NAME@REVISION`), or a model's page on huggingface.co.
        download: fetch what is not here; otherwise that is an error.

    Raises:
        CheckpointError: there is neither such a directory nor such a model.
    """
    model = model_of(source)
    if model is None:
        return Path(source)
    if not download:
        if (found := in_cache(source)) is None:
            raise CheckpointError(
                f"{source}: is not here, and nothing is downloaded to look at it only; download it, or name a directory"
            )
        return found
    from huggingface_hub import snapshot_download

    with explaining(str(source)):
        return Path(snapshot_download(model[0], revision=model[1], ignore_patterns=list(OTHER_FORMATS)))


def in_cache(source: str | Path) -> Path | None:
    """Like `resolve`, but nothing is downloaded: None where the Hub cache does not hold the model."""
    model = model_of(source)
    if model is None:
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            model[0], revision=model[1], ignore_patterns=list(OTHER_FORMATS), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return Path(found)
