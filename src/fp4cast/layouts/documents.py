"""The documents beside the weights, config.json and hf_quant_config.json, without which no engine loads them.

This module holds what all layouts need; each layout's file makes its own documents, which follow vLLM, SGLang,
TensorRT-LLM and the exports of nvidia-modelopt 0.47. docs/targets.md gives the reasons.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from fp4cast._version import __version__
from fp4cast.checkpoints.directory import CONFIG, Checkpoint
from fp4cast.checkpoints.header import UNQUANTIZED, Tensor
from fp4cast.checkpoints.quantization_config import find_quantization_config, misplaced_quantization_configs
from fp4cast.errors import CheckpointError, UsageError
from fp4cast.layouts.layout import Target, Writing


def documents(
    checkpoint: Checkpoint,
    target: Target,
    modules: Sequence[str],
    replaced: Collection[str],
    *,
    bank: bool,
    fp8: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """The config files of the destination by name.

    Args:
        checkpoint: the source.
        target: the layout.
        modules: the modules that become NVFP4; everything else stays as it is.
        replaced: the source tensors that they are made from.
        bank: whether some of them are banks of experts.
        fp8: the modules that become FP8.

    Raises:
        CheckpointError: a quantization_config of the source is not where, or not what, engines read.
        UsageError: the layout's configs cannot express what the source holds; or see `check_kv_cache`.
    """
    for sentence in misplaced_quantization_configs(checkpoint.config):
        raise CheckpointError(f"{checkpoint.path / CONFIG}: {sentence}")
    check_kv_cache(checkpoint, target)
    try:
        config = copy.deepcopy(dict(checkpoint.config))
    except RecursionError as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG}: is nested too deeply") from error
    kept, producer = _kept(checkpoint, target, replaced), {"name": "fp4cast", "version": __version__}
    return target.layout.documents(Writing(checkpoint, config, target, modules, kept, bank, producer, fp8))


def check_kv_cache(checkpoint: Checkpoint, target: Target) -> None:
    """Check that a source leaves the format of the KV cache to the target.

    Raises:
        UsageError: both ask for one.
    """
    own = find_quantization_config(checkpoint.config).section.get("kv_cache_scheme")
    if target.kv_cache != "none" and own is not None:
        raise UsageError(
            f"{checkpoint.path / CONFIG}: has a kv_cache_scheme of its own, {str(own)[:200]}; expected none, or no "
            f"--kv_cache_qformat {target.kv_cache}"
        )


def plain_modules(writing: Writing) -> list[str]:
    """The modules that are neither cast nor quantized in another way."""
    return [module for module, weight in writing.kept.items() if weight.dtype in UNQUANTIZED]


def _kept(checkpoint: Checkpoint, target: Target, replaced: Collection[str]) -> dict[str, Tensor]:
    """The weight matrices that are not cast; the configs must name each of them."""
    found: dict[str, Tensor] = {}
    for suffix in dict.fromkeys((target.family.codes.text, ".weight_packed", ".weight")):  # the last one prevails
        for name, tensor in checkpoint.tensors.items():
            if name.endswith(suffix) and name not in replaced and len(tensor.shape) >= 2:
                found[name.removesuffix(suffix)] = tensor
    return dict(sorted(found.items()))
