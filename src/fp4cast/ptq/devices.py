"""Where a model runs: on the CPU, on one GPU, or spread over the GPUs of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fp4cast.errors import UsageError
from fp4cast.extras import require

Placement = str | Mapping[str, Any]  # a device, or a device for each module, as transformers' device_map


def choose_device(name: str) -> str:
    """Choose a device of this machine: "auto" is the GPU if there is one.

    Raises:
        UsageError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; expected cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}: expected cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    return name


def use_device(device: str) -> AbstractContextManager[object]:
    """Make a GPU this thread's current one: otherwise some copies to `cuda:1` do not wait for its stream."""
    return torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext()


def place(model: nn.Module, device: str, share: float, sequential: bool) -> Placement:
    """Where each module goes: on one GPU where the weights fit there, else over all GPUs, never on CPU or disk.

    Args:
        model: on the meta device, in the dtypes that it will be loaded in.
        device: as `choose_device` returned it; only "cuda" may mean several GPUs.
        share: of each GPU's free memory, for weights; the rest is for activations.
        sequential: fill one GPU after the other instead of spreading the layers evenly.

    Raises:
        UsageError: the weights do not fit in the GPUs.
    """
    if torch.device(device).type == "cpu":
        return device
    gpus = range(torch.cuda.device_count()) if device == "cuda" else [torch.device(device).index]
    room = {gpu: int(share * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
    need = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if need <= next(iter(room.values())):
        return device
    spread = _spread(model, room, sequential) if len(room) > 1 else {"": "cpu"}
    if not set(spread.values()) <= set(room):
        sizes = ", ".join(f"{size / 2**30:.1f}" for size in room.values())
        raise UsageError(
            f"the model's weights take {need / 2**30:.1f} GiB, and {share:.0%} of the GPUs' free memory is {sizes} "
            "GiB; use more GPUs, a larger --gpu_max_mem_percentage, or --low_memory_mode: one layer at a time"
        )
    return spread


def _spread(model: nn.Module, room: Mapping[int, int], sequential: bool) -> dict[str, Any]:
    """A device for each module; "cpu" or "disk" for what does not fit."""
    utils = require("accelerate.utils", "ptq")
    whole = list(getattr(model, "_no_split_modules", None) or [])
    limits = dict(room)
    if not sequential:
        limits = utils.get_balanced_memory(model, limits, no_split_module_classes=whole)
    limits = {gpu: min(size, room[gpu]) for gpu, size in limits.items() if gpu in room}
    found: dict[str, Any] = utils.infer_auto_device_map(model, limits, no_split_module_classes=whole)
    return found
