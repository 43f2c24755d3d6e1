"""The client huggingface_hub: what it is built on, and what it raises, as errors that say what to do."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fp4cast.errors import CheckpointError

Result = TypeVar("Result")
_ATTEMPTS = 6
_LONGEST_WAIT = 300.0  # seconds: the Hub counts requests in windows of five minutes
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that another try may mend
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
def explaining(source: str, unreachable: str = _UNREACHABLE) -> Iterator[None]:
    """Turn the client's errors into a CheckpointError that names the model.

    Args:
        source: what the user called it.
        unreachable: what to say where the Hub is.
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
        raise CheckpointError(f"{source}: {unreachable}") from error
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


class Passing(Exception):  # noqa: N818
    """An answer that another try, at once, may mend."""


def patiently(what: str, ask: Callable[[], Result], *, alone: bool = False) -> Result:
    """Ask, and ask again where that may help: after the time that the server wishes, or 1, 2, 4, ... seconds.

    Args:
        what: is asked for, for the error.
        ask: one attempt; the client's errors, and `Passing`, tell what went wrong.
        alone: leave errors of the connection to the caller.

    Raises:
        CheckpointError: every attempt has failed.
        Exception: an error of the client that no other attempt mends.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return ask()
        except (Passing, connection_error()) as error:
            answer = getattr(error, "response", None)
            if (alone and answer is None) or (answer is not None and answer.status_code not in _PASSING):
                raise
            if attempt == _ATTEMPTS:
                why = str(error).strip() or type(error).__name__
                raise CheckpointError(
                    f"{what}: could not be read in {_ATTEMPTS} attempts, the last: {why}. Try again later."
                ) from error
            said = "" if answer is None else str(answer.headers.get("Retry-After", "")).strip()
            wait = float(said) if said.isdigit() else 0.0 if isinstance(error, Passing) else 2.0 ** (attempt - 1)
            time.sleep(min(wait, _LONGEST_WAIT))
