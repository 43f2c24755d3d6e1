"""Which way a conversion goes: from MXFP4 to NVFP4, or back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, get_args

from fp4cast.formats import one_of
from fp4cast.verification.original import Original

Direction = Literal["nvfp4", "mxfp4"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


def find_direction(name: str) -> Direction:
    """The direction of that name; a UsageError where there is none."""
    return one_of("--to", name, DIRECTIONS)


@dataclass(frozen=True)
class WayBack:
    """What a plan that goes from NVFP4 to MXFP4 knows beside it.

    Attributes:
        original: what the receipt says of the original; empty without a receipt that holds.
        renamed: where companions lay in the original: its card has its own name again, a conversion's has none.
        lost: the modules of which some exponents are known to nobody any more.
        dropped: the tensors that MXFP4 has no place for: input scales and scales of the KV cache.
    """

    original: Original
    renamed: Mapping[PurePosixPath, PurePosixPath]
    lost: frozenset[str]
    dropped: Sequence[str]
