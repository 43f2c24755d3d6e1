"""Resolve Hugging Face model ids with huggingface_hub, from its cache when offline."""

from __future__ import annotations

import re
from pathlib import Path

from fp4cast.checkpoints.directory import OTHER_FORMATS
from fp4cast.errors import CheckpointError

_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(source: str | Path) -> Path:
    """The directory of a checkpoint: the path itself, or a model id downloaded (or found in the Hub cache).

    Raises:
        CheckpointError: there is neither such a directory nor such a model.
    """
    path = Path(source)
    try:
        if path.exists() or not _MODEL_ID.fullmatch(str(source)):
            return path
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(source)[:200]}: cannot be read: {error}") from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(source), ignore_patterns=list(OTHER_FORMATS)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{source}: is not a directory, the Hub cache holds no model of that id, and the Hub cannot be reached. "
            "Check the spelling, or go online to download it."
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{source}: is neither a directory nor a model id: {error}") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{source}: the Hub refuses: {error}") from error
