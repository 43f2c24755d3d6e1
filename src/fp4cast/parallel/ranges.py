"""Cut work to size: ranges of a limited length, groups of a limited weight."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def spans(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut [first, last) into ranges of `size`, or of 1 if `size` is less; the last may be shorter.

    >>> list(spans(3, 8, 2))
    [(3, 5), (5, 7), (7, 8)]
    """
    size = max(1, size)
    for start in range(first, last, size):
        yield start, min(start + size, last)


def grouped(items: Iterable[tuple[Item, int]], weight: int, most: int = sys.maxsize) -> Iterator[list[Item]]:
    """Group consecutive items until their weight reaches `weight` or their number `most`.

    Args:
        items: (item, its weight).
        weight: completes a group.
        most: items of a group, at most.

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


def largest_first(items: Sequence[Item], nbytes: Callable[[Item], int] | None) -> Sequence[int]:
    """The numbers of the items, the largest first; in their order where sizes are not known.

    >>> list(largest_first(["a", "ccc", "bbb"], len))
    [1, 2, 0]
    """
    numbers = range(len(items))
    return numbers if nbytes is None else sorted(numbers, key=lambda i: -nbytes(items[i]))
