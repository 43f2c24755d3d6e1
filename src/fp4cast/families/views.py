"""A shard seen under other names: what a layout needs that is a known family's but for names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from fp4cast.checkpoints.header import Shard, Tensor
from fp4cast.errors import UnsupportedError


def renamed(shard: Shard, views: Callable[[Tensor], Iterable[Tensor]]) -> Shard:
    """A shard with other tensors of the same bytes.

    Args:
        shard: as its header says.
        views: returns the tensors that one is seen as, in the order of their bytes.

    Raises:
        UnsupportedError: two would have one name.
    """
    table: dict[str, Tensor] = {}
    for tensor in shard.tensors.values():
        for seen in views(tensor):
            if seen.name in table:
                raise UnsupportedError(f"{tensor.path}: {tensor} would be {seen.name!r}, but so would another tensor")
            table[seen.name] = seen
    return replace(shard, tensors=table)
