"""The documents beside the weights: what config.json and hf_quant_config.json must say for engines to load them.

Read from vLLM, SGLang, TensorRT-LLM and what nvidia-modelopt 0.47 exports; the reasons are in docs/targets.md.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fp4cast.checkpoints.directory import CONFIG, QUANT_CONFIG, Checkpoint
from fp4cast.checkpoints.header import Tensor
from fp4cast.checkpoints.quantization_config import drop_manifests, manifest
from fp4cast.errors import CheckpointError, UsageError
from fp4cast.families.recognise import UNQUANTIZED
from fp4cast.layouts.layout import Target

__all__ = ["documents", "to_bytes"]

GROUP_SIZE = 16
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.[^.]+$")


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON document as it is written."""
    return (json.dumps(document, indent=2) + "\n").encode()


def index_bytes(total: int, weight_map: Mapping[str, str]) -> bytes:
    """What `to_bytes` gives for an index: json is slow where it indents, and this is the one large document."""
    entries = json.dumps(weight_map, separators=(",\n    ", ": "))[1:-1]
    return (
        f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{\n    {entries}\n  }}\n}}\n'
    ).encode()


def documents(
    checkpoint: Checkpoint, target: Target, modules: Sequence[str], replaced: Collection[str], version: str
) -> dict[str, dict[str, Any]]:
    """The config files of the destination by name.

    Args:
        checkpoint: the source.
        target: the layout.
        modules: what becomes NVFP4; everything else stays as it is.
        replaced: the source tensors that they were made from.
        version: of fp4cast, for the `producer` field.
    """
    try:
        config = copy.deepcopy(dict(checkpoint.config))
    except RecursionError as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG}: is nested too deeply") from error
    kept = _kept_modules(checkpoint, replaced)
    producer = {"name": "fp4cast", "version": version}
    if target.layout == "compressed-tensors":
        _replace_manifest(config, _compressed(config, target, _plain_modules(checkpoint, kept)))
        return {CONFIG: config}
    if target.family == "deepseek-v4":
        section, quantization = _hybrid(manifest(config)[1], target, _banks(modules), producer)
        _replace_manifest(config, section)
    else:
        section, quantization = _modelopt(checkpoint, target, modules, kept)
        drop_manifests(config)
        config["quantization_config"] = section | {"producer": producer}
    return {CONFIG: config, QUANT_CONFIG: {"producer": producer, "quantization": quantization}}


def _replace_manifest(config: dict[str, Any], section: dict[str, Any]) -> None:
    """Put a manifest where the source's first one was, and drop all others."""
    path = manifest(config)[0] or ("quantization_config",)
    drop_manifests(config)
    scope = config
    for key in path[:-1]:
        scope = scope[key]
    scope[path[-1]] = section


def _plain_modules(checkpoint: Checkpoint, kept: Sequence[str]) -> list[str]:
    """Of the modules that are not cast, those that are not quantized at all."""
    tensors = checkpoint.tensors
    return [name for name in kept if f"{name}.weight" in tensors and tensors[f"{name}.weight"].dtype in UNQUANTIZED]


def _kept_modules(checkpoint: Checkpoint, replaced: Collection[str]) -> list[str]:
    """Modules with a weight matrix that is not cast: an engine must be told so about each of them."""

    def is_matrix(tensor: Tensor) -> bool:
        return tensor.name not in replaced and len(tensor.shape) >= 2

    names = (name for name, tensor in checkpoint.tensors.items() if is_matrix(tensor))
    suffixes = (".weight", ".weight_packed")
    return sorted({name.removesuffix(s) for name in names for s in suffixes if name.endswith(s)})


def _banks(modules: Iterable[str]) -> list[str]:
    """Expert banks (`...experts`) for routed experts, the modules themselves otherwise; sorted, each once."""
    return sorted({match[1] if (match := _EXPERT.match(module)) else module for module in modules})


def _spellings(module: str) -> list[str]:
    """Every name under which a loader may look up a Kimi-K3 module."""
    names = [module]
    if ".block_sparse_moe." in module:
        names.append(module.replace(".block_sparse_moe.", ".mlp."))
    return names + [name.removeprefix("language_model.") for name in names if name.startswith("language_model.")]


def _args() -> dict[str, Any]:
    return {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP_SIZE}


def _group(target: Target, targets: list[str]) -> dict[str, Any]:
    activations = {"input_activations": _args()} if target.activations == "w4a4" else {}
    return {**activations, "weights": _args(), "targets": targets}


def _layers(target: Target, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {name: {"quant_algo": target.algorithm, "group_size": GROUP_SIZE} for name in names}


def _modelopt(
    checkpoint: Checkpoint, target: Target, modules: Sequence[str], kept: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(quantization_config without producer, `quantization` of hf_quant_config.json)."""
    _refuse_other_groups(checkpoint, kept)
    ignore = _short_ignore(modules, kept) if target.transposed else list(kept)
    if target.transposed or _is_plain(modules, ignore):
        section: dict[str, Any] = {
            "config_groups": {"group_0": _group(target, ["Linear"])},
            "ignore": ignore,
            "quant_algo": target.algorithm,
            "quant_method": "modelopt",
        }
        if not target.transposed:  # ModelOpt's own gpt-oss export has no such key here
            section["group_size"] = GROUP_SIZE
        return section, _quantization(target.algorithm, ignore)
    names = sorted({name for bank in _banks(modules) for name in _spellings(bank)})
    layers = _layers(target, names)
    section = {
        "config_groups": {"group_0": _group(target, names)},
        "group_size": GROUP_SIZE,
        "ignore": [],
        "quant_algo": "MIXED_PRECISION",
        "quant_method": "modelopt_mixed",
        "quantized_layers": layers,
    }
    return section, _quantization("MIXED_PRECISION", [], layers)


def _refuse_other_groups(checkpoint: Checkpoint, kept: Sequence[str]) -> None:
    """ModelOpt's configs could not say how a source's other quantized groups (FP8 attention, say) are stored."""
    tensors = checkpoint.tensors
    for module in kept:
        weight = tensors.get(f"{module}.weight") or tensors[f"{module}.weight_packed"]
        if weight.dtype not in UNQUANTIZED:
            raise UsageError(
                f"{checkpoint.path}: {weight} is quantized in another way than MXFP4, which the modelopt layout "
                "of this family cannot say; use --layout compressed-tensors, which keeps the other groups as they are"
            )


def _quantization(
    algorithm: str, exclude: list[str], layers: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    return {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "group_size": GROUP_SIZE,
        **({"quantized_layers": dict(layers)} if layers else {}),
        "exclude_modules": exclude,
    }


def _is_plain(modules: Sequence[str], ignore: Sequence[str]) -> bool:
    """Whether one algorithm and a list of exceptions says it all, as for dense models.

    vLLM also matches exceptions as substrings, so an exception that is part of a cast module's name (a router `gate`
    beside `gate_proj`) needs the explicit list of `MIXED_PRECISION` instead.
    """
    if any(_EXPERT.match(module) for module in modules):
        return False
    text = "\n".join(modules)
    fused = {f"{name.rpartition('.')[0]}.{leaf}" for name in modules for leaf in _FUSED_NAMES}
    return not any(name in text or any(name in other for other in fused) for name in ignore)


_FUSED_NAMES = ("gate_up_proj", "qkv_proj", "fused_qkv_a_proj")


def _short_ignore(modules: Sequence[str], kept: Sequence[str]) -> list[str]:
    """What ModelOpt's gpt-oss export lists: attention modules as a pattern where all of one stays, the rest by name."""
    touched = {module.partition(".self_attn.")[0] for module in modules if ".self_attn." in module}

    def entry(module: str) -> str:
        layer, attention, _ = module.partition(".self_attn.")
        return f"{layer}.self_attn*" if attention and layer not in touched else module

    return sorted({entry(module) for module in kept})


def _hybrid(
    section: Mapping[str, Any], target: Target, names: list[str], producer: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """DeepSeek-V4: the FP8 config as it was, and beside it that the routed experts are NVFP4."""
    ignore = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
    layers = _layers(target, names)
    hybrid = dict(section) | {
        "quant_method": "fp8",
        "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION",
        "group_size": GROUP_SIZE,
        "ignore": ignore,
        "quantized_layers": layers,
        "config_groups": {"group_0": _group(target, names)},
        "producer": producer,
    }
    return hybrid, _quantization("MIXED_PRECISION", ignore, layers)


def _compressed(config: Mapping[str, Any], target: Target, kept: Sequence[str]) -> dict[str, Any]:
    """compressed-tensors `nvfp4-pack-quantized`: the source's manifest with its MXFP4 groups replaced."""
    section = dict(manifest(config)[1])
    old = section.get("ignore")
    ignore = [entry for entry in old if isinstance(entry, str)] if isinstance(old, list) else []
    groups = section.get("config_groups")
    groups = groups if isinstance(groups, dict) and groups else {"group_0": {"targets": ["Linear"]}}
    section |= {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if section.get("format") == "mixed-precision" else "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {name: _compressed_group(group, target) for name, group in groups.items()},
        # Exact names beside the source's patterns, whether these cover them or not: nothing is left to a pattern.
        "ignore": ignore + sorted(set(kept) - set(ignore)),
    }
    return section


def _is_mxfp4(weights: Mapping[str, Any]) -> bool:
    wanted = {"num_bits": 4, "type": "float", "group_size": 32}
    return all(weights.get(key, value) == value for key, value in wanted.items())


def _compressed_group(group: Any, target: Target) -> Any:
    weights = group.get("weights") if isinstance(group, dict) else None
    if weights and not (isinstance(weights, dict) and _is_mxfp4(weights)):
        return group
    spec = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": GROUP_SIZE, "symmetric": True}
    activations = {**spec, "dynamic": "local"} if target.activations == "w4a4" else None
    new = {**group, "weights": {**spec, "dynamic": False}, "input_activations": activations}
    return new | ({"format": "nvfp4-pack-quantized"} if "format" in group else {})
