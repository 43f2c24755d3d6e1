"""The part of a bank of experts that one rank holds, and how it is copied into padded parameters: plain torch.

Banks are stored as ModelOpt writes them, with the output channel last: codes [E, K/2, N], block scales [E, K/16, N];
vLLM holds [E, N, K/2] and [E, N, K/16]. Ranks divide the intermediate size as vLLM's `_load_weights_mxfp4`
(model_executor/models/gpt_oss.py) does, but in blocks of 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fp4cast.formats import NV_BLOCK

Kind = Literal["codes", "block_scale", "scalar", "bias"]
_PACKED = {"codes": 2, "block_scale": NV_BLOCK, "bias": 1}  # elements along the intermediate size that one entry holds


@dataclass(frozen=True)
class Part:
    """What a rank holds of one bank.

    Attributes:
        experts: the experts' numbers in the checkpoint, in the order in which the rank holds them; None for all.
        start: the first of its intermediate channels.
        stop: the last one, plus one.
        inner: all of them.
        hidden: the hidden size, without padding.
        first: it adds the biases of w2, which only one rank of a tensor-parallel group may do.
        gate_up: the bank is w13, with gate and up interleaved along its outputs; else w2.
    """

    experts: list[int] | None
    start: int
    stop: int
    inner: int
    hidden: int
    first: bool
    gate_up: bool

    @classmethod
    def of(cls, layer: Any, gate_up: bool, block: int = NV_BLOCK) -> Part:
        """The part that a `RoutedExperts` layer of vLLM holds."""
        config = layer.moe_config
        start, stop = share(config.intermediate_size, config.tp_size, config.tp_rank, block)
        experts = local_experts(getattr(layer, "_expert_map", None), config.num_experts)
        return cls(
            experts, start, stop, config.intermediate_size, config.hidden_dim_unpadded, config.tp_rank == 0, gate_up
        )


def share(inner: int, ranks: int, rank: int, block: int = NV_BLOCK) -> tuple[int, int]:
    """The intermediate channels [start, stop) of a rank: whole blocks, the same number for all but the last."""
    if inner % block:
        raise ValueError(f"the intermediate size is {inner}, expected a multiple of {block}")
    each = math.ceil(inner // block / ranks) * block
    return min(rank * each, inner), min((rank + 1) * each, inner)


def local_experts(expert_map: Tensor | None, count: int) -> list[int] | None:
    """The experts of a rank, in its own order, from vLLM's map of their places (-1: elsewhere); None for all."""
    if expert_map is None:
        return None
    places = expert_map.tolist()[:count]
    return sorted((expert for expert, place in enumerate(places) if place >= 0), key=places.__getitem__)


def filled_region(parameter: Tensor, bias: bool, packed: int, part: Part) -> Tensor:
    """The view of a parameter that the checkpoint fills; what lies beyond it is padding.

    Args:
        parameter: of a layer.
        bias: it holds biases, [E, N].
        packed: how many elements along K one of its entries holds.
        part: what the rank has of the bank.
    """
    inner = part.stop - part.start
    if bias:
        return parameter[:, : 2 * inner if part.gate_up else part.hidden]
    if part.gate_up:
        return parameter[:, : 2 * inner, : part.hidden // packed]
    return parameter[:, : part.hidden, : inner // packed]


def filled_regions(layer: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each padded parameter of a layer, what finds the view that the checkpoint fills."""
    kinds: dict[str, Kind] = {"_weight": "codes", "_weight_scale": "block_scale", "_bias": "bias"}
    return {
        f"{held}{leaf}": partial(
            filled_region, bias=kind == "bias", packed=_PACKED[kind], part=Part.of(layer, held == "w13")
        )
        for held in ("w13", "w2")
        for leaf, kind in kinds.items()
    }


def fill(parameter: Tensor, stored: Tensor, part: Part, kind: Kind) -> None:
    """Copy a rank's part of a stored bank, scalar or bias into a parameter.

    Raises:
        ValueError: the stored tensor has another shape than the layer needs.
    """
    target = parameter.data
    if kind == "scalar":
        _fill_scalars(target, stored, part)
        return
    _check(stored, kind, part)
    if part.experts is not None:
        stored = stored[part.experts]
    packed = _PACKED[kind]
    if kind == "bias":
        if part.gate_up:
            stored = stored[:, 2 * part.start : 2 * part.stop]
        elif not part.first:
            stored = torch.zeros_like(stored)
    elif part.gate_up:
        stored = stored[..., 2 * part.start : 2 * part.stop].transpose(1, 2)
    else:
        stored = stored[:, part.start // packed : part.stop // packed].transpose(1, 2)
    region = filled_region(target, kind == "bias", packed, part)
    if kind != "bias":  # bytes: not every device copies E4M3
        region, stored = region.view(torch.uint8), stored.view(torch.uint8)
    if region.shape != stored.shape:
        raise ValueError(f"{list(stored.shape)} of it for {list(region.shape)} places")
    region.copy_(stored)


def _fill_scalars(target: Tensor, stored: Tensor, part: Part) -> None:
    """One number for all experts, as ModelOpt writes it, or one for each."""
    if stored.numel() == 1:
        target.fill_(stored.reshape(()).to(target.device, target.dtype))
        return
    if part.experts is not None:
        stored = stored[part.experts]
    if stored.shape != target.shape[:1]:
        raise ValueError(f"expected one number, or {len(target)}")
    target.copy_(stored.reshape(-1, *[1] * (target.ndim - 1)).expand_as(target))


def _check(stored: Tensor, kind: Kind, part: Part) -> None:
    packed = _PACKED[kind]
    outputs, inputs = (2 * part.inner, part.hidden) if part.gate_up else (part.hidden, part.inner)
    expected = [outputs] if kind == "bias" else [inputs // packed, outputs]
    if list(stored.shape[1:]) != expected:
        raise ValueError(f"expected [experts, {', '.join(map(str, expected))}]")
