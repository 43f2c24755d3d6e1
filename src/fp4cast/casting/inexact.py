"""The values of `--inexact`: what happens to a scale domain that no tensor scale represents exactly."""

from __future__ import annotations

from typing import Literal, get_args

from fp4cast.errors import UsageError

Inexact = Literal["fail", "nearest"]
INEXACT: tuple[Inexact, ...] = get_args(Inexact)


def check_inexact(word: str) -> None:
    """Raise if a word is not one of `INEXACT`.

    Raises:
        UsageError: it is not.
    """
    if word not in INEXACT:
        raise UsageError(f"inexact must be {' or '.join(map(repr, INEXACT))}, got {word!r}")
