"""Packages that only some commands need: imported when they are, with an error that gives the install line."""

from __future__ import annotations

import importlib
from typing import Any

from fp4cast.errors import MissingExtraError

__all__ = ["require"]


def require(module: str, extra: str) -> Any:
    """An optional module.

    Args:
        module: what to import.
        extra: the extra of fp4cast that installs it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module} is not installed: pip install 'fp4cast[{extra}]' ({error})") from error
