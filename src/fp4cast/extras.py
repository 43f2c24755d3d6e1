"""Optional packages: import one when a command needs it, or raise an error with the install line."""

from __future__ import annotations

import importlib
from typing import Any

from fp4cast.errors import MissingExtraError


def require(module: str, extra: str) -> Any:
    """Import an optional module.

    Args:
        module: what to import.
        extra: the fp4cast extra that installs it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module} is not installed: {install_line(extra)} ({error})") from error


def install_line(extra: str) -> str:
    """How to install an extra where fp4cast is installed (pip takes the version that is there), and in a checkout."""
    return f"pip install 'fp4cast[{extra}]', or in a checkout pip install '.[{extra}]'"
