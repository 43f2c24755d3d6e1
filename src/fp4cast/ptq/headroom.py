"""Activation amax with headroom, by the rule of ModelOpt 0.47's `nvfp4_act_headroom`: from a histogram of block amax.

Engines quantize activations in blocks of 16 under one tensor scale S = amax / 2688. A larger amax leaves room above
for values that calibration never saw; a smaller one keeps blocks of small values from rounding to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fp4cast.errors import UsageError
from fp4cast.formats import NV_BLOCK

# Its constants, without which no amax would be its own.
_BINS, _LOWEST, _HIGHEST = 512, -40.0, 40.0  # bins of log2(block amax)
_NEGLIGIBLE = 1e6  # blocks that are smaller than the upper end by this factor do not count for the anchor
_NORMAL_RANGE = 448 * 2**6  # of E4M3: under one S, normal block scales span no more


def _bins(block_amax: Tensor) -> Tensor:
    """The bin of each block amax, int64, in float32 arithmetic and ModelOpt's order of operations."""
    place = (torch.log2(block_amax) - _LOWEST) / (_HIGHEST - _LOWEST)
    return (place * _BINS).floor().long().clamp(0, _BINS - 1)


class BlockHistogram:
    """The block amax of everything that one input took in.

    Args:
        counting: count blocks; otherwise only the largest magnitude is kept.

    Attributes:
        largest: the largest magnitude, float32 []; 0 before the first tensor.
        counts: int64 [512], blocks by log2 of their amax; None before the first block that is not all zeros.
    """

    def __init__(self, counting: bool = True) -> None:
        self.counting = counting
        self.largest = torch.zeros(())
        self.counts: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Include a tensor of any rank and floating-point dtype, in blocks along its last axis."""
        if not x.numel():
            return
        if not self.counting:
            self._include(torch.linalg.vector_norm(x.detach(), ord=float("inf")).float(), None)
            return
        blocks = functional.pad(x.detach(), (0, -x.shape[-1] % NV_BLOCK)).reshape(-1, NV_BLOCK)
        amax = torch.linalg.vector_norm(blocks, ord=float("inf"), dim=1).float()
        counted = amax[(amax > 0) & amax.isfinite()]
        self._include(amax.amax(), torch.bincount(_bins(counted), minlength=_BINS) if counted.numel() else None)

    def merge(self, other: BlockHistogram) -> None:
        """Include what another has seen."""
        self._include(other.largest, other.counts)

    def _include(self, largest: Tensor, counts: Tensor | None) -> None:
        self.largest = torch.maximum(self.largest.to(largest.device), largest)
        if counts is not None:
            self.counts = counts if self.counts is None else self.counts + counts


@dataclass(frozen=True)
class Headroom:
    """The rule: amax = max(rho * anchor, upper), anchor and upper being percentiles of the block amax.

    Attributes:
        anchor_percentile: of the anchor, in (0, 100].
        upper_percentile: of the top of what was seen, in (0, 100]; 100 is the largest magnitude itself. Below 100, rare
            blocks beyond it saturate, where each alone would raise the scale of all.
        rho: how far the anchor lies below the amax, in (0, 28672): the range of normal E4M3 numbers.

    Raises:
        UsageError: a number outside of its range.
    """

    anchor_percentile: float = 1.0
    upper_percentile: float = 99.99
    rho: float = 16384.0

    def __post_init__(self) -> None:
        for name in ("anchor_percentile", "upper_percentile"):
            if not 0 < getattr(self, name) <= 100:
                raise UsageError(f"{name}: expected more than 0 and at most 100, got {getattr(self, name)}")
        if not 0 < self.rho < _NORMAL_RANGE:
            raise UsageError(f"rho: expected more than 0 and less than {_NORMAL_RANGE}, got {self.rho}")

    def amax(self, seen: BlockHistogram) -> Tensor:
        """The amax, float32 []; the largest magnitude where no block was counted, or where it is NaN or infinite."""
        if (ends := self._ends(seen)) is None:
            return seen.largest
        return torch.tensor(max(ends), dtype=torch.float32, device=seen.largest.device)

    def leaves_none(self, seen: BlockHistogram) -> bool:
        """Whether the blocks span so much that the amax is but the upper end of what was seen."""
        ends = self._ends(seen)
        return ends is None or ends[0] <= ends[1]

    def _ends(self, seen: BlockHistogram) -> tuple[float, float] | None:
        """(rho * anchor, upper), None where neither is known."""
        largest, counts = seen.largest, seen.counts
        if counts is None or not largest.isfinite():
            return None
        upper = float(largest) if self.upper_percentile >= 100 else _percentile(counts, self.upper_percentile)
        floor = int(_bins(torch.tensor(upper / _NEGLIGIBLE)))
        above = torch.where(torch.arange(_BINS, device=counts.device) < floor, 0, counts)
        return self.rho * _percentile(above, self.anchor_percentile), upper


def chosen_rules(headroom: Headroom | None, per: str | None, cramped: Iterable[bool]) -> dict[str, Any]:
    """The rules of input scales as reports tell them, and of how many inputs with one the rule leaves no headroom."""
    chosen = None if headroom is None else asdict(headroom) | {"none_left": sum(cramped)}
    return {"act_headroom": chosen, "input_scales_per": per}


def _percentile(counts: Tensor, percentile: float) -> float:
    """The middle of the bin in which a percentile lies.

    The rank is rounded to float32 as ModelOpt's is; its counts are float32, too, ours exact. So both agree bit for bit
    to 2^24 blocks, beyond which its sums are rounded.
    """
    below = counts.cumsum(0)
    rank = math.ceil(np.float32(percentile / 100) * np.float32(int(below[-1])))
    place = min(int(torch.searchsorted(below, rank)), _BINS - 1)
    return float(2.0 ** (_LOWEST + (place + 0.5) / _BINS * (_HIGHEST - _LOWEST)))
