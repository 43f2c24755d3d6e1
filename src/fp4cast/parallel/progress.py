"""The types of progress callbacks; worker threads may call them."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[int], None]  # (amount just done); it may raise to stop the work
AdvanceOf = Callable[[int, int], None]  # (amount just done, amount in all)
Progress = Callable[[str, int, int], None]  # (phase, amount just done, amount in all); most phases count bytes


def ignore(*_: object) -> None:
    """Do nothing."""
