"""The client huggingface_hub: what it is built on, and what it raises, as errors that say what to do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fp4cast.errors import CheckpointError

_UNREACHABLE = (
    "is not a directory, the Hub cache holds no model of that id, and the Hub cannot be reached. "
    "Check the spelling, or go online to download it."
)


def client_utils() -> Any:
    """The module huggingface_hub.utils, which takes half a second to import."""
    return importlib.import_module("huggingface_hub.utils")


def connection_error() -> type[Exception]:
    """The base of all errors of connections: of httpx2, httpx or requests, whichever huggingface_hub uses."""
    client = sys.modules[type(client_utils().get_session()).__module__.partition(".")[0]]
    found: type[Exception] = getattr(client, "RequestException", None) or client.HTTPError
    return found


@contextmanager
def explaining(source: str) -> Iterator[None]:
    """Turn the client's errors into a CheckpointError that names the model.

    Args:
        source: what the user called it.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(f"{source}: {_UNREACHABLE}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{source}: is neither a directory nor a model id: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{source}: the Hub gives it to those who have accepted its conditions. Accept them on its page, then log "
            f"in with `hf auth login`: {error}"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{source}: the Hub refuses: {error}") from error
    except connection_error() as error:
        raise CheckpointError(f"{source}: the Hub cannot be reached: {error or type(error).__name__}") from error
