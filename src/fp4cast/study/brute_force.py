"""The tight rule against brute force, for anyone to run: `python -m fp4cast.study.brute_force`.

A half-block is a set of magnitudes and an exponent offset e = k - m. It is representable if some positive E4M3 scale s
turns every magnitude c * 2^e into s times a magnitude. That is tried with all 126 scales, in exact arithmetic, and
knows nothing of shifts or windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from fp4cast.formats import E2M1, E4M3

SETS = range(1, 128)  # bit i of a set is magnitude code i + 1; the empty set is always representable
OFFSETS = range(-16, 16)
TRIED = "127 sets of magnitudes x 601 offsets x 126 scales"
_MAGNITUDES = E2M1.values[1:8]
_SCALES = E4M3.values[0x01:0x7F]


def representable(e: int) -> npt.NDArray[np.bool_]:
    """Whether each set is representable with k - m = e: bool [127], by trying every scale."""
    # float64 holds products and powers of two exactly here, so a product that is equal is equal.
    products = _SCALES[:, None] * _MAGNITUDES
    fits = (_MAGNITUDES[:, None, None] * 2.0**e == products).any(axis=2)  # [magnitude, scale]
    members = (np.array(SETS)[:, None] >> np.arange(7) & 1).astype(bool)
    return np.asarray((fits[None] | ~members[:, :, None]).all(axis=1).any(axis=1))


def rule(members: int, e: int) -> bool:
    """What the theorem says about a set, from the definition of its shifts: -9 - a_max <= e <= 8 - a_min."""
    smallest, largest = _shifts(members)
    return -9 - largest <= e <= 8 - smallest


@cache
def _shifts(members: int) -> tuple[int, int]:
    values = [float(value) for i, value in enumerate(_MAGNITUDES) if members >> i & 1]
    shifts = [a for a in range(-3, 4) if all(value / 2.0**a in _MAGNITUDES for value in values)]
    return min(shifts), max(shifts)


def disagreements(offsets: range = range(-300, 301)) -> Iterator[tuple[int, int]]:
    """(set, offset) for which the rule and brute force differ."""
    for e in offsets:
        for members, fits in zip(SETS, representable(e), strict=True):
            if fits != rule(members, e):
                yield members, e


def exactness_map() -> list[str]:
    """A line for each set of magnitudes, a letter for each of `OFFSETS`: v(erbatim), s(hifted) or . (not exact)."""
    columns = [representable(e) for e in OFFSETS]
    letters = [np.where(fits, "v" if -9 <= e <= 8 else "s", ".") for e, fits in zip(OFFSETS, columns, strict=True)]
    return ["".join(line) for line in np.stack(letters, axis=1)]


def main() -> int:
    """Say what was tried; the exit status is whether something differs."""
    wrong = list(disagreements())
    for members, e in wrong:
        print(f"set {members:07b}, k - m = {e}: the rule says {rule(members, e)}, brute force does not")
    print(f"{TRIED}: {len(wrong)} disagreements")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
