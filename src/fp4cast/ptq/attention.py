"""Attention whose keys and values pass through FP8 quantizers on their way into the KV cache.

Names are ModelOpt's: `k_bmm_quantizer` and `v_bmm_quantizer` of each attention. Keys are taken after the rotary
embedding, as they are cached.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fp4cast.errors import QuantizerError, UnsupportedError
from fp4cast.formats import usable_scale
from fp4cast.ptq.max_calibration import check_amax
from fp4cast.ptq.qformats import KV_CACHE
from fp4cast.ptq.quantizer import TensorQuantizer

_E4M3_TOP = 448.0
_CACHE = "past_key_values"
_KEYS, _VALUES = "k_bmm_quantizer", "v_bmm_quantizer"


class Fp8Quantizer(TensorQuantizer):
    """Rounds a tensor to FP8 (E4M3) under one scale."""

    def enable_calib(self, histogram: bool = False) -> None:  # noqa: ARG002, headroom is a rule for NVFP4's blocks
        """Observe tensors and remember their amax, instead of rounding them."""
        super().enable_calib()

    def fake_quant(self, x: Tensor) -> Tensor:
        """Round x; an uncalibrated quantizer takes the tensor's own amax."""
        amax = x.detach().abs().amax().float() if self.amax is None else self.amax
        scale = (amax / _E4M3_TOP).clamp_min(torch.finfo(torch.float32).tiny)
        scaled = (x.float() / scale).clamp(-_E4M3_TOP, _E4M3_TOP)
        return (scaled.to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


class _Cache:
    """Stands in for a KV cache, or for none, while one attention runs: what it is given is quantized first."""

    def __init__(self, attention: nn.Module, cache: Any) -> None:
        self._attention, self._cache = attention, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See transformers' Cache."""
        keys = self._attention.get_submodule(_KEYS)(keys)
        values = self._attention.get_submodule(_VALUES)(values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _pass_through(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook before an attention's forward."""
    return args, {**kwargs, _CACHE: _Cache(module, kwargs.get(_CACHE))}


def cached_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions of a model by name, if engines cache the keys and values that they compute.

    Raises:
        UnsupportedError: it has none, or their cache holds something else.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention")
        and _CACHE in inspect.signature(type(module).forward).parameters
        and KV_CACHE.enables(f"{name}.{_KEYS}")
    }
    constants = "use --kv_cache_qformat fp8_cast, whose scales are 1"
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__}: no attention with a KV cache of transformers found; {constants}"
        )
    for name, module in found.items():
        if hasattr(module, "kv_lora_rank"):
            raise UnsupportedError(
                f"{name}: engines cache a latent vector instead of its keys and values, whose scales say nothing about "
                f"it; {constants}"
            )
    return found


def attach_kv_cache(model: nn.Module) -> int:
    """Let the keys and values of every attention pass through quantizers; returns how many quantizers there are.

    Raises:
        UnsupportedError: see `cached_attentions`, or there are such quantizers already; nothing is changed.
    """
    attentions = cached_attentions(model)
    if quantizes_kv_cache(model):
        raise UnsupportedError(f"{type(model).__name__} has quantizers of keys and values already")
    for attention in attentions.values():
        device = next(attention.parameters()).device
        for name in (_KEYS, _VALUES):
            attention.add_module(name, Fp8Quantizer().to(device))
        attention.register_forward_pre_hook(_pass_through, with_kwargs=True)
    return 2 * len(attentions)


def _quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer, TensorQuantizer]]:
    for name, module in model.named_modules():
        keys, values = getattr(module, _KEYS, None), getattr(module, _VALUES, None)
        if isinstance(keys, TensorQuantizer) and isinstance(values, TensorQuantizer):
            yield name, keys, values


def quantizes_kv_cache(model: nn.Module) -> bool:
    """Whether a model has quantizers of keys and values."""
    return any(True for _ in _quantizers(model))


def calibrated_kv_scales(model: nn.Module) -> dict[str, tuple[float, float]]:
    """By attention, the scales of its keys and of its values: float32 numbers, amax / 448.

    Raises:
        QuantizerError: there is none, or one is not calibrated.
    """
    found = {
        name: (_scale(f"{name}.{_KEYS}", keys), _scale(f"{name}.{_VALUES}", values))
        for name, keys, values in _quantizers(model)
    }
    if not found:
        raise QuantizerError(
            f"{type(model).__name__}: has no quantizers of keys and values; attach_kv_cache(model), and calibrate it"
        )
    return found


def _scale(name: str, quantizer: TensorQuantizer) -> float:
    amax = quantizer.amax
    if amax is None or amax.is_meta:
        raise QuantizerError(f"{name}: never observed anything; run the model on calibration data")
    check_amax(name, float(amax))
    scale = float(amax.cpu() / _E4M3_TOP)  # on a CPU: a GPU multiplies by the reciprocal
    if not usable_scale(scale):
        raise QuantizerError(f"{name}: a largest magnitude of {float(amax):g} gives no scale that engines can use")
    return scale
