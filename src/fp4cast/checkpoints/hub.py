"""Resolve Hugging Face model ids with huggingface_hub, from its cache when offline."""

from __future__ import annotations

from pathlib import Path

from fp4cast.checkpoints.directory import OTHER_FORMATS
from fp4cast.checkpoints.instead import model_id
from fp4cast.errors import CheckpointError


def resolve(source: str | Path) -> Path:
    """The directory of a checkpoint: the path itself, or a model downloaded (or found in the Hub cache).

    Args:
        source: a directory, a model id (`ORG/NAME`, `ORG/NAME@REVISION`), or a model's page on huggingface.co.

    Raises:
        CheckpointError: there is neither such a directory nor such a model.
    """
    if not str(source).strip():
        raise CheckpointError("the checkpoint's name is empty; expected a directory or a model id, ORG/NAME")
    path = Path(source)
    try:
        if path.exists() or not (model := model_id(str(source))):
            return path
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(source)[:200]}: cannot be read: {error}") from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(model[0], revision=model[1], ignore_patterns=list(OTHER_FORMATS)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{source}: is not a directory, the Hub cache holds no model of that id, and the Hub cannot be reached. "
            "Check the spelling, or go online to download it."
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{source}: is neither a directory nor a model id: {error}") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{source}: the Hub refuses: {error}") from error
