"""Watch a model's products, and find the largest magnitude in the input of each weight, or count its blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fp4cast.ptq.headroom import BlockHistogram

Input = tuple[str, int]  # a weight's name, and one of its experts

_PRODUCTS = {
    functional.linear,
    torch.bmm,
    torch.matmul,
    torch.mm,
    Tensor.__matmul__,
    Tensor.bmm,
    Tensor.matmul,
    Tensor.mm,
}


class Observer(TorchFunctionMode):
    """While active, observes every product of an input with a watched weight, or with one of its experts.

    It sees what any model computes, however its modules are written, as long as experts are multiplied one by one or
    all together (transformers' eager implementation). Nothing is changed.

    Args:
        counting: count blocks, for an amax with headroom.

    Attributes:
        seen: the inputs by (weight's name, expert); expert 0 for a weight of one projection.
    """

    def __init__(self, counting: bool = False) -> None:
        super().__init__()
        self.seen: defaultdict[Input, BlockHistogram] = defaultdict(partial(BlockHistogram, counting))
        self._watched: dict[int, tuple[str, Tensor]] = {}

    def watch(self, weights: Mapping[str, Tensor]) -> None:
        """Watch these weights, [N, K] or experts [E, ...], instead of the previous ones."""
        self._watched = {weight.untyped_storage().data_ptr(): (name, weight) for name, weight in weights.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS:
            given = (*args, *(kwargs or {}).values())
            if len(given) >= 2 and isinstance(given[0], Tensor) and isinstance(given[1], Tensor):
                self._see(given[0], given[1])
        return func(*args, **(kwargs or {}))

    def _see(self, x: Tensor, weight: Tensor) -> None:
        found = self._watched.get(weight.untyped_storage().data_ptr())
        if found is None or not x.numel():
            return
        name, whole = found
        if whole.ndim == 3 and weight.ndim == 3 and weight.shape[0] == whole.shape[0]:
            for expert in range(len(whole)):  # all together, each with rows of its own or all with the same
                self.seen[name, expert].add(x[expert] if x.ndim == 3 and len(x) == len(whole) else x)
            return
        offset = weight.storage_offset() - whole.storage_offset()
        self.seen[name, offset // whole.stride(0) if whole.ndim == 3 else 0].add(x)
