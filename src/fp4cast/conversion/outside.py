"""The exponents that NVFP4 block scales do not tell: those of blocks outside of the window, as a text for the receipt.

Such a block was shifted, or holds zeros. Its exponent gives the way back its bytes, codes too; its value needs none.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fp4cast.casting.tight_rule import Ints
from fp4cast.formats import E8M0_NAN, Bytes

_LEAST = 512  # bytes that a tensor may always take
_PART = 2048  # scale bytes for one more
_RUN = 9  # bytes of a run


class Outside(NamedTuple):
    """Some blocks of a tensor.

    Attributes:
        numbers: of the blocks, ascending.
        exponents: their E8M0 bytes.
    """

    numbers: Ints
    exponents: Bytes

    def within(self, start: int, rows: int, width: int, stride: int) -> Outside:
        """Those of `rows` rows of `width` blocks, `stride` apart, from block `start` on, numbered within them."""
        first, last = np.searchsorted(self.numbers, (start, start + (rows - 1) * stride + width))
        row, across = np.divmod(self.numbers[first:last] - start, stride)
        here = across < width
        return Outside((row * width + across)[here], self.exponents[first:last][here])

    def encode(self, blocks: int) -> str | None:
        """A text, empty for no block; None where it would be long for a tensor of so many blocks.

        It holds runs of blocks of one exponent that lie equally far apart: lengths, distances, exponents.
        """
        if not self.numbers.size:
            return ""
        steps = np.diff(self.numbers, prepend=-1)
        other = (np.diff(steps) != 0) | (np.diff(self.exponents) != 0)
        starts = np.concatenate([[0], np.flatnonzero(other) + 1])
        lengths = np.diff(starts, append=len(steps))
        data = (
            lengths.astype("<u4").tobytes() + steps[starts].astype("<u4").tobytes() + self.exponents[starts].tobytes()
        )
        return base64.b64encode(data).decode() if len(data) <= max(_LEAST, blocks // _PART) else None


def join(parts: Iterable[tuple[Ints, Bytes]]) -> Outside:
    """The blocks of some parts, one after the other."""
    numbers, exponents = zip(*parts, strict=True)
    return Outside(np.concatenate(numbers), np.concatenate(exponents))


def decode(text: str, blocks: int) -> Outside | None:
    """What a text of a receipt says of a tensor of so many blocks; None where it is none that `encode` writes."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    runs = len(data) // _RUN
    if not data or len(data) % _RUN:
        return None
    lengths, steps = (np.frombuffer(data, "<u4", runs, 4 * runs * i).astype(np.int64) for i in (0, 1))
    reach = (lengths * steps.astype(np.float64)).sum()  # which no product overflows
    exponents = np.frombuffer(data, np.uint8, runs, 8 * runs)
    # All numbers are below `blocks`, each larger than the one before: so few are they that they may be written out.
    if (lengths < 1).any() or (steps < 1).any() or reach > blocks or (exponents == E8M0_NAN).any():
        return None
    return Outside(np.cumsum(np.repeat(steps, lengths)) - 1, np.repeat(exponents, lengths))
