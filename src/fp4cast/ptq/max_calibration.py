"""Max calibration: the largest magnitudes of weights and of their inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fp4cast.errors import QuantizerError, ShapeError, UnsupportedError
from fp4cast.families.merging import expert_projection, shared_scale_group
from fp4cast.ptq.headroom import Headroom
from fp4cast.ptq.modules import QuantLinear, quantized_weights, weight_quantizers
from fp4cast.ptq.quantizer import TensorQuantizer, promote_nvfp4_static_quantizers


def max_calibrate(
    model: nn.Module,
    forward_loop: Callable[[nn.Module], object] | None = None,
    distributed_sync: bool = True,
    headroom: Headroom | None = None,
) -> None:
    """Calibrate every enabled quantizer of a model afresh, and promote those of static weights.

    Weights need no forward pass. Inputs are observed while `forward_loop` runs the model.

    Args:
        model: with quantizers attached.
        forward_loop: called with the model, to run it on calibration data; None calibrates weights only.
        distributed_sync: take the largest amax of all ranks, where torch.distributed is initialised.
        headroom: the rule for the amax of inputs; None for their largest magnitude.

    Raises:
        UnsupportedError: no quantizer is enabled.
    """
    weights = {id(quantizer) for _, quantizer, _ in quantized_weights(model)}
    inputs = [
        module
        for module in model.modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled and id(module) not in weights
    ]
    if not weights and not inputs:
        raise UnsupportedError(f"{type(model).__name__} has no enabled quantizer: attach a qformat first")
    try:
        with torch.no_grad():
            _calibrate_weights(model)
            if forward_loop is not None:
                _calibrate_inputs(model, inputs, forward_loop, headroom)
            if distributed_sync and distributed.is_available() and distributed.is_initialized():
                _take_largest(model)
            if forward_loop is not None:
                _fill_idle_experts(model)  # the experts that were idle on all ranks
    finally:
        promote_nvfp4_static_quantizers(model)
        share_global_amax(model)


def _calibrate_weights(model: nn.Module) -> None:
    for name, quantizer, weight in quantized_weights(model):
        quantizer.reset_amax()
        calibrate_weight(name, quantizer, weight)


def calibrate_weight(name: str, quantizer: TensorQuantizer, weight: Tensor) -> None:
    """Observe a weight, its blocks along the last axis.

    Raises:
        ShapeError: its rows are not whole blocks.
        QuantizerError: it holds NaN or infinity.
    """
    try:
        quantizer.collect(weight)
    except ShapeError as error:
        raise ShapeError(f"{name}: {error}") from error
    top = quantizer.tensor_amax
    if top is not None and not top.is_meta and not torch.isfinite(top):
        raise QuantizerError(f"{name}: holds NaN or infinity, which NVFP4 cannot hold; is the checkpoint damaged?")


def _calibrate_inputs(
    model: nn.Module,
    inputs: Sequence[TensorQuantizer],
    forward_loop: Callable[[nn.Module], object],
    headroom: Headroom | None,
) -> None:
    """Observe the inputs while the model runs with unquantized weights."""
    weights = [quantizer for _, quantizer, _ in quantized_weights(model)]
    for quantizer in weights:
        quantizer.disable()
    for quantizer in inputs:
        quantizer.reset_amax()
        quantizer.enable_calib(histogram=headroom is not None)
    try:
        forward_loop(model)
    finally:
        for quantizer in inputs:
            quantizer.disable_calib(headroom)
        for quantizer in weights:
            quantizer.enable()


def _take_largest(model: nn.Module) -> None:
    """Set every amax to the largest of all ranks; a rank that saw nothing takes that of the others."""
    found = [each for each in model.modules() if isinstance(each, TensorQuantizer) and each.is_enabled]
    for quantizer in found:
        known = quantizer.amax
        scalar = torch.full((), -1.0) if known is None else known
        if quantizer.static and known is None:
            continue  # weights are calibrated on every rank
        largest = scalar.to(found[0].device)  # of a rank's several GPUs, one takes part
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        if (largest >= 0).all():
            quantizer.amax = largest.to(quantizer.device)


def check_amax(name: str, amax: float) -> None:
    """Check that the observed amax of an input gives a scale.

    Raises:
        QuantizerError: it was zero throughout, NaN or infinite.
    """
    if not 0 < amax < math.inf:
        what = "was zero on all calibration data" if amax == 0 else f"reached {amax} on calibration data"
        raise QuantizerError(f"{name}: its input {what}, so it has no scale; use more or other data")


def share_global_amax(model: nn.Module) -> None:
    """Give weights that engines merge the largest global amax of their group: they will share one tensor scale."""
    groups: dict[str, list[TensorQuantizer]] = defaultdict(list)
    for name, quantizer, _ in quantized_weights(model):
        group, members = shared_scale_group(name.removesuffix(".weight"))
        if len(members) > 1:
            groups[group].append(quantizer)
    for quantizers in groups.values():
        seen = [quantizer.tensor_amax for quantizer in quantizers]
        known = [amax for amax in seen if amax is not None and not amax.is_meta]
        if known:
            largest = torch.stack([amax.cpu() for amax in known]).amax()
            for quantizer, amax in zip(quantizers, seen, strict=True):
                if amax is not None and not amax.is_meta:
                    quantizer.tensor_amax = largest.to(amax.device)


def _fill_idle_experts(model: nn.Module) -> None:
    """Give experts of a list that saw no token the largest amax of the others in their layer."""
    groups: dict[tuple[str, str], list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and (expert := expert_projection(name)):
            groups[expert].append(module)
    for experts in groups.values():
        set_expert_quantizer_amax(experts)


def set_expert_quantizer_amax(
    modules: nn.Module | Iterable[nn.Module], quantizer_attrs: str | Sequence[str] = "input_quantizer"
) -> list[nn.Module]:
    """Give quantizers of experts that saw no token the amax of their group.

    Args:
        modules: modules of one kind, such as the up projections of one layer's experts, or a bank of experts.
        quantizer_attrs: names of their quantizers, which are one group: those of one bank's projections, for example.

    Returns:
        The modules of which some enabled quantizer had no amax. It was given the largest of the group, or of the
        weights where no expert saw a token; none where there is neither (the meta device holds no values).
    """
    modules = [modules] if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList) else list(modules)
    names = [quantizer_attrs] if isinstance(quantizer_attrs, str) else list(quantizer_attrs)
    pairs: list[tuple[nn.Module, Any]] = [(module, getattr(module, name, None)) for module in modules for name in names]
    group = [(module, quantizer) for module, quantizer in pairs if getattr(quantizer, "is_enabled", False)]
    missing = [(module, quantizer) for module, quantizer in group if not _is_known(quantizer.amax)]
    known = [quantizer.amax.amax().cpu() for _, quantizer in group if _is_known(quantizer.amax)]
    if not known:
        known = [
            weight.abs().amax().float().cpu()
            for module in dict.fromkeys(module for module, _ in group)
            for _, _, weight in weight_quantizers(module)
            if not weight.is_meta
        ]
    if known:
        largest = torch.stack(known).amax()
        for module, quantizer in missing:
            device = next((p.device for p in module.parameters() if not p.is_meta), largest.device)
            quantizer.amax = largest.to(device)
    return list(dict.fromkeys(module for module, _ in missing))


def _is_known(amax: Tensor | None) -> bool:
    return amax is not None and not amax.is_meta and bool(amax.numel())
