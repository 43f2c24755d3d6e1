"""Run a decoder layer by layer: read one layer's weights, send all samples through it, then take the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fp4cast.errors import UnsupportedError
from fp4cast.parallel.progress import AdvanceOf
from fp4cast.ptq.layerwise.parameters import Weights

BATCH = {"cpu": 4, "cuda": 16}  # samples that run together, by the kind of device
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Watcher(AbstractContextManager[object], Protocol):
    """What is active while a layer runs."""

    def watch(self, weights: Mapping[str, Tensor]) -> None:
        """The layer's parameters by their full names; none once it has run."""


def find_decoder(model: Any) -> tuple[str, Any]:
    """(name, decoder) of a model.

    Raises:
        UnsupportedError: it has no list of layers.
    """
    for decoder in (model.get_decoder(), getattr(model, "model", None)):  # Llama-4's method returns the whole model
        layers = getattr(decoder, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return next(name for name, module in model.named_modules() if module is decoder), decoder
    raise UnsupportedError(f"{type(model).__name__} has no list of layers to run one by one")


@torch.no_grad()
def run_layers(
    model: Any,
    weights: Weights,
    batches: Sequence[Tensor],
    observer: Watcher,
    progress: AdvanceOf,
) -> None:
    """Send batches of token ids through a model's decoder, observing every product of its layers.

    Args:
        model: empty, as `empty_model` gives it.
        weights: its checkpoint's.
        batches: int64 [n, length] each.
        observer: sees the layers' parameters.
        progress: called with (layers just done, total layers).
    """
    name, decoder = find_decoder(model)
    layers: nn.ModuleList = decoder.layers
    layer_names = [f"{name}.layers.{i}".lstrip(".") for i in range(len(layers))]
    outer = nn.ModuleDict({key: module for key, module in decoder.named_children() if key != "layers"})
    with _filled(name, outer, weights):
        hidden, calls = _enter(decoder, layers, batches, weights.device)
    for layer_name, layer, layer_calls in zip(layer_names, layers, calls, strict=True):
        with _filled(layer_name, layer, weights), observer:
            observer.watch({f"{layer_name}.{key}": parameter for key, parameter in layer.named_parameters()})
            for i, call in enumerate(layer_calls):
                args, kwargs = _moved(call, lambda tensor: tensor.to(weights.device))
                out = layer(hidden[i].to(weights.device), *args, **kwargs)
                hidden[i] = _states(out, layer_name).cpu()
            observer.watch({})  # or it would hold the layer's weights while the next are read
        progress(1, len(layers))


def _states(out: Any, layer: str) -> Tensor:
    if not isinstance(out, Tensor):
        raise UnsupportedError(f"{layer} returns {type(out).__name__}; expected hidden states alone")
    return out


@contextmanager
def _filled(name: str, module: nn.Module, weights: Weights) -> Iterator[None]:
    """Fill a module's parameters and saved buffers for a `with` block, and empty it afterwards."""
    saved = set(module.state_dict())
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    empty = {key: tensor for key, tensor in tensors.items() if key in saved}
    moved = {key: tensor for key, tensor in tensors.items() if key not in saved}
    for key, tensor in empty.items():
        full = f"{name}.{key}".lstrip(".")
        _put(module, key, weights.read(full, tensor.shape, tensor.dtype))
    for key, tensor in moved.items():
        _put(module, key, tensor.to(weights.device))
    try:
        yield
    finally:
        for key, tensor in empty.items():
            _put(module, key, tensor.to("meta"))


def _put(module: nn.Module, key: str, value: Tensor) -> None:
    parent, _, leaf = key.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _enter(
    decoder: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor], device: str
) -> tuple[list[Tensor], list[list[Call]]]:
    """(the first layer's input for each batch, the other arguments of each layer: masks, positions)."""
    calls: list[list[Call]] = [[] for _ in layers]
    entered: list[Tensor] = []
    pool = _Pool()

    def record(i: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls[i].append(_moved((args, kwargs), pool))
            if i == 0:
                entered.append(hidden_states.cpu())
            return hidden_states

        return forward

    for i, layer in enumerate(layers):
        layer.forward = record(i)
    try:
        for batch in batches:
            decoder(input_ids=batch.to(device), use_cache=False)
    finally:
        for layer in layers:
            del layer.forward  # the class has its own
    return entered, calls


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Replace every tensor in nested arguments."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, dict):
        return {key: _moved(each, move) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(each, move) for each in value)
    return value


class _Pool:
    """Keeps tensors in memory once: masks and positions are the same for all batches of a length, and most layers."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)

    def __call__(self, tensor: Tensor) -> Tensor:
        found = tensor.cpu()
        kept = self._kept[tuple(found.shape), found.dtype]
        same = next((each for each in kept if torch.equal(each, found)), None)
        if same is None:
            kept.append(found)
        return found if same is None else same
