"""Quantized modules: linear layers and batched experts whose inputs and weights pass through quantizers.

A module is quantized in place, by exchanging its class, so that parameters, hooks and names stay. Experts in one tensor
[E, K, N] are multiplied along K, which is therefore the axis of their blocks. Experts in one tensor [E, N, K] become a
list of experts, whose names are those of their checkpoints.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp4cast.conversion.input_scales import ScalesPer
from fp4cast.errors import QuantizerError, UnsupportedError, UsageError
from fp4cast.families.merging import expert_projection
from fp4cast.ptq.batched_experts import FORWARDS
from fp4cast.ptq.qformats import QFormat
from fp4cast.ptq.quantizer import TensorQuantizer

_BATCHED = ("gate_up_proj", "down_proj")


class QuantLinear(nn.Linear):
    """y = Q(x) Q(W)^T + b."""

    input_quantizer: TensorQuantizer
    weight_quantizer: TensorQuantizer

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """See torch.nn.Linear."""
        return functional.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class QuantExperts(nn.Module):
    """Experts that transformers 5 holds as [E, 2 I, H] and [E, H, I], as a list of experts of three projections each.

    The inputs of all experts share a quantizer, as in ModelOpt, unless each shall have its own scale. Experts that saw
    no token have the scale of the others.
    """

    fused: type[Any]  # the class that it was, which knows the activation

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Transformers' eager experts, with every product's input and weight quantized."""
        result = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index.flatten().tolist())):
            if str(expert) not in self._modules:
                continue  # no expert: transformers masks tokens so
            slot, token = torch.where(expert == top_k_index.T)  # in transformers' order: rows that round alike
            gate, up, down = (cast(QuantLinear, each) for each in self.get_submodule(str(expert)).children())
            states = gate.input_quantizer(hidden_states[token])
            # In one product, as transformers does: sums in another order would round differently.
            weight = torch.cat([each.weight_quantizer(each.weight) for each in (gate, up)])
            gated = self.fused._apply_gate(self, functional.linear(states, weight))
            out = down(gated) * top_k_weights[token, slot, None]
            result.index_add_(0, token, out.to(result.dtype))
        return result


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds gated experts [E, 2 I, H] and [E, H, I] without biases, as transformers marks them."""
    shapes = {name: value.shape for name, value in module.named_parameters(recurse=False)}
    if shapes.keys() != set(_BATCHED) or any(len(shape) != 3 for shape in shapes.values()):
        return False
    marks = [getattr(module, mark, None) for mark in ("has_gate", "is_transposed", "has_bias")]
    (experts, both, hidden), down = shapes["gate_up_proj"], shapes["down_proj"]
    fits = both % 2 == 0 and tuple(down) == (experts, hidden, both // 2)
    return fits and marks == [True, False, False] and hasattr(type(module), "_apply_gate")


def _split(module: Any, quantizers: dict[str, TensorQuantizer], static: bool, alone: bool) -> None:
    """Make fused experts a list in place, each with input quantizers of its own if `alone`; weights become views."""
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    module.fused, module.__class__ = type(module), QuantExperts
    del module.gate_up_proj, module.down_proj
    for expert in range(len(down)):
        gate, up = gate_up[expert].chunk(2)
        split = nn.Module()
        inputs = copy.deepcopy(quantizers) if alone else quantizers
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down[expert])):
            linear = QuantLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            key = "down_proj" if name == "down_proj" else "gate_up_proj"
            on = quantizers[f"{key}_weight_quantizer"].is_enabled
            linear.weight_quantizer = TensorQuantizer(static=static, enabled=on).to(weight.device)
            linear.input_quantizer = inputs[f"{key}_input_quantizer"]
            split.add_module(name, linear)
        module.add_module(str(expert), split)


# Each class of experts gets one quantized class, made when it is first met, since transformers' classes are not
# imported before. `torch.save` pickles a module's class by name, so `__getattr__` makes it again in a process that has
# not met it yet.
_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def _quantized_experts(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The quantized class of a class of batched experts, or None if it is not one that we know."""
    forward = FORWARDS.get((cls.__module__, cls.__name__))
    if forward is not None and cls not in _MADE:
        _MADE[cls] = type(f"Quant{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})
    return _MADE.get(cls)


def __getattr__(name: str) -> type[nn.Module]:
    """The class of quantized experts of that name, for pickle."""
    for module, cls in FORWARDS:
        if name == f"Quant{cls}" and (made := _quantized_experts(getattr(importlib.import_module(module), cls))):
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class _Change:
    """The change that makes a module a quantized one."""

    module: nn.Module
    kind: type[nn.Module]
    quantizers: dict[str, TensorQuantizer]


def _change(module: nn.Module, name: str, qformat: QFormat, static: bool) -> _Change | None:
    """The change of one module, None where it has no weights that we quantize.

    Raises:
        UnsupportedError: the format turns on experts that we cannot quantize.
    """
    experts = _quantized_experts(type(module))
    if type(module) is nn.Linear:
        kind: type[nn.Module] = QuantLinear
        prefixes: tuple[str, ...] = ("",)
    elif experts is not None:
        kind, prefixes = experts, tuple(f"{each}_" for each in _BATCHED)
    elif _is_fused(module):
        kind, prefixes = QuantExperts, tuple(f"{each}_" for each in _BATCHED)
    else:
        _refuse_experts(module, name, qformat)
        return None
    device = next(module.parameters()).device
    quantizers = {}
    for prefix in prefixes:
        for side in ("weight", "input"):
            key = f"{prefix}{side}_quantizer"
            on = qformat.enables(f"{name}.{key}")
            quantizers[key] = TensorQuantizer(static=static and side == "weight", enabled=on).to(device)
    if kind is QuantExperts and not any(quantizer.is_enabled for quantizer in quantizers.values()):
        return None
    return _Change(module, kind, quantizers)


def _refuse_experts(module: nn.Module, name: str, qformat: QFormat) -> None:
    """Raise for experts that would silently stay as they are."""
    for parameter, value in module.named_parameters(recurse=False):
        if value.ndim == 3 and "experts" in name and qformat.enables(f"{name}.{parameter}_weight_quantizer"):
            known = ", ".join(cls for _, cls in FORWARDS)
            raise UnsupportedError(
                f"{name}.{parameter}: {qformat.name} quantizes it, but {type(module).__name__} is not supported, "
                f"only {known}, and gated experts [E, N, K] without biases. For an MXFP4 checkpoint, use fp4cast "
                "convert (and fp4cast calibrate)."
            )


def attach(model: nn.Module, qformat: QFormat, static: bool = False, input_scales_per: ScalesPer | None = None) -> int:
    """Quantize a model's linear layers and batched experts in place; the output head stays as it is.

    Args:
        model: a transformers model, or any other.
        qformat: which quantizers are on.
        static: keep the block amax of weights, as the cast needs.
        input_scales_per: "bank" for one input quantizer for all experts of a layer, "expert" for one each; None for
            ModelOpt's choice: experts in one tensor share, a list of experts does not.

    Returns:
        The number of quantizers that are on.

    Raises:
        UnsupportedError: none is, the model is quantized already, or it has experts that cannot be; nothing is changed.
        UsageError: experts in one tensor shall have a scale each; nothing is changed.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, TensorQuantizer) for module in modules.values()):
        raise UnsupportedError(f"{type(model).__name__} has quantizers already; attach a format to a model as loaded")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = (_change(module, name, qformat, static) for name, module in modules.items() if module is not head)
    changes = [change for change in found if change is not None]
    enabled = sum(quantizer.is_enabled for change in changes for quantizer in change.quantizers.values())
    if not enabled:
        raise UnsupportedError(
            f"no quantizer of {type(model).__name__} matches {qformat.name}: nothing would be quantized"
        )
    if input_scales_per == "expert":
        _refuse_banks(changes)
    for change in changes:
        if change.kind is QuantExperts:
            _split(change.module, change.quantizers, static, alone=input_scales_per == "expert")
            continue
        change.module.__class__ = change.kind
        for key, quantizer in change.quantizers.items():
            setattr(change.module, key, quantizer)
    if input_scales_per == "bank":
        _share_inputs(model)
    for change in changes:
        if "_old_forward" in vars(change.module):  # a hook of accelerate, which moves inputs, holds the class's forward
            change.module._old_forward = type(change.module).forward.__get__(change.module)
    return enabled


def _refuse_banks(changes: Iterable[_Change]) -> None:
    for change in changes:
        if change.kind in _MADE.values() and any(each.is_enabled for each in change.quantizers.values()):
            raise UsageError(
                f"{type(change.module).__name__}: its experts lie in one tensor, which has one input scale in every "
                "layout, so that experts cannot have one each; drop --input_scales_per expert"
            )


def _share_inputs(model: nn.Module) -> None:
    """Give the experts of a list one input quantizer for each projection."""
    shared: dict[tuple[str, str], TensorQuantizer] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and (projection := expert_projection(name)):
            module.input_quantizer = shared.setdefault(projection, module.input_quantizer)


def weight_quantizers(module: nn.Module) -> Iterator[tuple[str, TensorQuantizer, Tensor]]:
    """(attribute of the weight, its quantizer, the weight with its blocks along the last axis) of one module."""
    if isinstance(module, QuantLinear):
        yield "weight", module.weight_quantizer, module.weight
    elif type(module) in _MADE.values():
        for name in _BATCHED:
            quantizer = getattr(module, f"{name}_weight_quantizer")
            yield name, quantizer, getattr(module, name).transpose(-1, -2)


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer, Tensor]]:
    """(full name of the weight, quantizer, weight by rows of blocks) for all enabled weight quantizers."""
    for name, module in model.named_modules():
        for attribute, quantizer, weight in weight_quantizers(module):
            if quantizer.is_enabled:
                yield f"{name}.{attribute}" if name else attribute, quantizer, weight


def is_bank(weight: str) -> bool:
    """Whether a weight of `quantized_weights` is a bank of experts, which has no module of its own."""
    return not weight.endswith(".weight")


def input_quantizer(model: nn.Module, weight: str) -> TensorQuantizer:
    """The quantizer of the input of a weight of `quantized_weights`."""
    name = f"{weight}_input_quantizer" if is_bank(weight) else f"{weight.removesuffix('.weight')}.input_quantizer"
    quantizer = model.get_submodule(name)
    if not isinstance(quantizer, TensorQuantizer):
        raise QuantizerError(f"{name}: expected a TensorQuantizer, got {type(quantizer).__name__}")
    return quantizer
