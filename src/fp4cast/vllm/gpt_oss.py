"""gpt-oss's banks of NVFP4 experts on their way from ModelOpt's names into vLLM's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor

from fp4cast.errors import CheckpointError
from fp4cast.vllm.banks import Kind, Part, fill

_BANK = ".mlp.experts"
_KINDS: tuple[tuple[str, str, Kind], ...] = (
    ("", "_weight", "codes"),
    ("_weight_scale", "_weight_scale", "block_scale"),
    ("_weight_scale_2", "_weight_scale_2", "scalar"),
    ("_input_scale", "_input_scale", "scalar"),
    ("_bias", "_bias", "bias"),
)
_NAMES = {
    f"{stored}{suffix}": (f"{held}{ours}", kind)
    for stored, held in (("gate_up_proj", "w13"), ("down_proj", "w2"))
    for suffix, ours, kind in _KINDS
}


def take_banks(model_class: Any, method: type) -> None:
    """Let `GptOssForCausalLM.load_weights` load NVFP4 banks with fp4cast; done once, and harmless when repeated.

    Args:
        model_class: the model's class.
        method: the quantization method of the layers that are ours.
    """
    theirs = model_class.load_weights
    if hasattr(theirs, "fp4cast"):
        return

    @wraps(theirs)
    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        banks, loaded = _banks(self, method), set[str]()
        if not banks:
            return set(theirs(self, weights))
        return set(theirs(self, _others(weights, banks, loaded))) | loaded

    load_weights.fp4cast = True  # type: ignore[attr-defined]
    model_class.load_weights = load_weights


def _banks(model: Any, method: type) -> dict[str, tuple[str, Any]]:
    """The layers whose method is ours, with their names in vLLM, by the names of their banks in the checkpoint."""
    return {
        name[: name.index(_BANK) + len(_BANK)]: (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), method) and _BANK in name
    }


def _others(
    weights: Iterable[tuple[str, Tensor]], banks: dict[str, tuple[str, Any]], loaded: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Load what belongs to a bank; yield everything else."""
    for name, tensor in weights:
        base, _, leaf = name.rpartition(".")
        if not base.endswith(_BANK) or leaf not in _NAMES:
            yield name, tensor
        elif base in banks:  # else it belongs to another stage of the pipeline
            held, layer = banks[base]
            parameter, kind = _NAMES[leaf]
            try:
                fill(getattr(layer, parameter), tensor, Part.of(layer, parameter.startswith("w13")), kind)
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"{name} {list(tensor.shape)} does not fit {held}.{parameter}: {error}"
                ) from error
            loaded.add(f"{held}.{parameter}")
