"""Quantized modules: linear layers and batched experts whose inputs and weights pass through quantizers.

A module is quantized in place, by exchanging its class, so that parameters, hooks and names stay. Experts in one tensor
[E, K, N] are multiplied along K, which is therefore the axis of their blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp4cast.errors import QuantizerError, UnsupportedError
from fp4cast.ptq.qformats import QFormat
from fp4cast.ptq.quantizer import TensorQuantizer

__all__ = ["QuantLinear", "attach", "block_rows", "input_quantizer", "quantized_weights", "weight_quantizers"]

_BATCHED = ("gate_up_proj", "down_proj")


class QuantLinear(nn.Linear):
    """y = Q(x) Q(W)^T + b."""

    input_quantizer: TensorQuantizer
    weight_quantizer: TensorQuantizer

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """See torch.nn.Linear."""
        return functional.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


def block_rows(weight: Tensor, batched: bool) -> Tensor:
    """A weight with its blocks along the last axis: [N, K] as it is, batched experts [E, K, N] as [E, N, K]."""
    return weight.transpose(-1, -2) if batched else weight


def _through(module: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """An input and a batched weight, quantized."""
    quantizer = getattr(module, f"{name}_weight_quantizer")
    weight = quantizer(block_rows(getattr(module, name), batched=True).contiguous()) if quantizer.is_enabled else None
    rounded = getattr(module, name) if weight is None else block_rows(weight, batched=True)
    return getattr(module, f"{name}_input_quantizer")(x), rounded


def _gpt_oss_forward(
    self: Any, hidden_states: Tensor, router_indices: Tensor | None = None, routing_weights: Tensor | None = None
) -> Tensor:
    """Transformers' eager gpt-oss experts, with every product's input and weight quantized."""
    if router_indices is None or routing_weights is None:
        raise UnsupportedError("gpt-oss experts need router_indices and routing_weights")
    states, gate_up_proj = _through(self, "gate_up_proj", hidden_states)
    result = torch.zeros_like(hidden_states)
    routed = []
    for expert in sorted(set(router_indices.flatten().tolist())):
        if expert < self.num_experts:
            slot, token = torch.where(expert == router_indices.T)  # in transformers' order: rows that round alike
            gate_up = states[token] @ gate_up_proj[expert] + self.gate_up_proj_bias[expert]
            routed.append((expert, token, slot, self._apply_gate(gate_up)))
    if not routed:
        return result
    # One input quantizer for all experts: it sees what all of them take in.
    gated, down_proj = _through(self, "down_proj", torch.cat([gate for *_, gate in routed]))
    parts = torch.split(gated, [len(token) for _, token, *_ in routed])
    for (expert, token, slot, _), part in zip(routed, parts, strict=True):
        out = part @ down_proj[expert] + self.down_proj_bias[expert]
        result.index_add_(0, token, (out * routing_weights[token, slot, None]).to(result.dtype))
    return result


def _llama4_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Transformers' Llama-4 experts, likewise."""
    states = hidden_states.view(self.gate_up_proj.shape[0], -1, self.hidden_size)
    states, gate_up_proj = _through(self, "gate_up_proj", states)
    gate, up = torch.bmm(states, gate_up_proj).chunk(2, dim=-1)
    gated, down_proj = _through(self, "down_proj", up * self.act_fn(gate))
    result: Tensor = torch.bmm(gated, down_proj).view(-1, self.hidden_size)
    return result


_EXPERTS = {
    ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts"): _gpt_oss_forward,
    ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts"): _llama4_forward,
}


_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def _quantized_experts(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The quantized class of a class of batched experts, or None if it is not one that we know."""
    forward = _EXPERTS.get((cls.__module__, cls.__name__))
    if forward is not None and cls not in _MADE:
        _MADE[cls] = type(f"Quant{cls.__name__}", (cls,), {"forward": forward})
    return _MADE.get(cls)


def _quantize_module(module: nn.Module, name: str, qformat: QFormat, static: bool) -> int:
    """Give a module its quantizers; how many of them are on."""
    experts = _quantized_experts(type(module))
    names: tuple[str, ...]
    kind: type[nn.Module]
    if type(module) is nn.Linear:
        kind, names = QuantLinear, ("",)
    elif experts is not None:
        kind, names = experts, tuple(f"{each}_" for each in _BATCHED)
    else:
        return 0
    quantizers = {
        f"{prefix}{side}_quantizer": TensorQuantizer(static=static and side == "weight")
        for prefix in names
        for side in ("weight", "input")
    }
    module.__class__ = kind
    for key, quantizer in quantizers.items():
        if not qformat.enables(f"{name}.{key}"):
            quantizer.disable()
        setattr(module, key, quantizer)
    return sum(quantizer.is_enabled for quantizer in quantizers.values())


def attach(model: nn.Module, qformat: QFormat, static: bool = False) -> int:
    """Quantize a model's linear layers and batched experts in place.

    Args:
        model: of transformers, or any other.
        qformat: which quantizers are on.
        static: keep the block amax of weights, as the cast needs.

    Returns:
        How many quantizers are on.

    Raises:
        UnsupportedError: none is.
    """
    enabled = sum(_quantize_module(module, name, qformat, static) for name, module in list(model.named_modules()))
    if not enabled:
        raise UnsupportedError(
            f"no quantizer of {type(model).__name__} matches {qformat.name}: nothing would be quantized"
        )
    return enabled


def weight_quantizers(module: nn.Module) -> Iterator[tuple[str, TensorQuantizer, Tensor]]:
    """(attribute of the weight, its quantizer, the weight with its blocks along the last axis) of one module."""
    if isinstance(module, QuantLinear):
        yield "weight", module.weight_quantizer, block_rows(module.weight, batched=False)
    elif type(module) in _MADE.values():
        for name in _BATCHED:
            quantizer = getattr(module, f"{name}_weight_quantizer")
            yield name, quantizer, block_rows(getattr(module, name), batched=True)


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer, Tensor]]:
    """(full name of the weight, quantizer, weight by rows of blocks) for all enabled weight quantizers."""
    for name, module in model.named_modules():
        for attribute, quantizer, weight in weight_quantizers(module):
            if quantizer.is_enabled:
                yield f"{name}.{attribute}" if name else attribute, quantizer, weight


def input_quantizer(model: nn.Module, weight: str) -> TensorQuantizer:
    """What quantizes the input that a weight of `quantized_weights` is multiplied with."""
    linear = weight.removesuffix(".weight")
    name = f"{weight}_input_quantizer" if linear == weight else f"{linear}.input_quantizer"
    quantizer = model.get_submodule(name)
    if not isinstance(quantizer, TensorQuantizer):
        raise QuantizerError(f"{name}: expected a TensorQuantizer, got {type(quantizer).__name__}")
    return quantizer
