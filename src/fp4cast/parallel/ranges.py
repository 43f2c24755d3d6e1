"""Cutting work to size: ranges of at most so many, items together until they are enough."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["grouped", "spans"]

Item = TypeVar("Item")


def spans(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """[first, last) in ranges of `size`, at least one; the last may be shorter.

    >>> list(spans(3, 8, 2))
    [(3, 5), (5, 7), (7, 8)]
    """
    size = max(1, size)
    for start in range(first, last, size):
        yield start, min(start + size, last)


def grouped(items: Iterable[tuple[Item, int]], weight: int, most: int = sys.maxsize) -> Iterator[list[Item]]:
    """Neighbours together until they weigh enough or are many.

    Args:
        items: (item, its weight).
        weight: at which a group is complete.
        most: items of a group.

    >>> list(grouped([("a", 1), ("b", 1), ("c", 5), ("d", 0)], 2))
    [['a', 'b'], ['c'], ['d']]
    """
    group: list[Item] = []
    total = 0
    for item, own in items:
        group.append(item)
        total += own
        if total >= weight or len(group) >= most:
            yield group
            group, total = [], 0
    if group:
        yield group
