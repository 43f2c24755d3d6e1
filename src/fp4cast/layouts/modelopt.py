"""NVIDIA ModelOpt's layout: the tensors' names, config.json and hf_quant_config.json.

Four kinds of config, for banks of experts (gpt-oss), FP8 checkpoints with NVFP4 experts (DeepSeek-V4), models that one
algorithm and a list of exceptions describe, and all others (`MIXED_PRECISION`). Read in the exports of nvidia-modelopt
0.47 and in vLLM 0.32, model_executor/layers/quantization/modelopt.py (`is_layer_excluded`,
`ModelOptMixedPrecisionConfig`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fp4cast.checkpoints.directory import CONFIG, QUANT_CONFIG
from fp4cast.checkpoints.header import UNQUANTIZED
from fp4cast.checkpoints.quantization_config import (
    drop_quantization_configs,
    find_quantization_config,
    set_quantization_config,
)
from fp4cast.errors import UsageError
from fp4cast.families.merging import expert_projection, merged_module
from fp4cast.formats import NV_BLOCK
from fp4cast.layouts.fp8 import ALGORITHM
from fp4cast.layouts.kv_cache import FP8
from fp4cast.layouts.layout import Form, Layout, Names, Target, Writing

Section = dict[str, Any]
_PAIRS = 1_000_000  # modules times exceptions that are compared: a second; Llama-3.1-405B has 2,646


def _documents(writing: Writing) -> dict[str, Section]:
    config, producer = writing.config, writing.producer
    if writing.target.family.beside_fp8 and find_quantization_config(config).section.get("quant_method") == "fp8":
        section, quantization = _beside_fp8(writing)
        set_quantization_config(config, section | {"producer": producer})
    else:
        _refuse_other_groups(writing)
        section, quantization = _bank(writing) if writing.bank else _projections(writing)
        if writing.target.kv_cache != "none":
            section["kv_cache_scheme"] = FP8
            quantization["kv_cache_quant_algo"] = "FP8"
        drop_quantization_configs(config)
        config["quantization_config"] = section | {"producer": producer}
    return {CONFIG: config, QUANT_CONFIG: {"producer": producer, "quantization": quantization}}


MODELOPT = Layout(
    name="modelopt",
    projection=Form(Names(".weight", ".weight_scale", ".weight_scale_2", ".input_scale")),
    bank=Form(Names("", "_weight_scale", "_weight_scale_2", "_input_scale"), transposed=True),
    documents=_documents,
    kv_scales=(".k_proj.k_scale", ".v_proj.v_scale"),
)


def _refuse_other_groups(writing: Writing) -> None:
    """Raise for other quantized groups (FP8 attention, say): these configs cannot describe them."""
    for weight in writing.kept.values():
        if weight.dtype not in UNQUANTIZED:
            raise UsageError(
                f"{writing.checkpoint.path}: {weight} is quantized in another way than MXFP4, which the modelopt "
                f"layout of this family cannot express; {_way_out(writing.target)}"
            )


def _way_out(target: Target) -> str:
    if target.family.beside_fp8:
        return "expected a config.json whose quantization_config has the quant_method fp8"
    others = [f"--layout {name}" for name in target.family.layouts if name != target.layout.name]
    return f"use {others[0]}, which keeps the other groups as they are" if others else "expected no other groups"


def _algorithm(target: Target) -> str:
    """ModelOpt's name for the quantization of a cast layer."""
    return "NVFP4" if target.activations == "w4a4" else "W4A16_NVFP4"


def _bank(writing: Writing) -> tuple[Section, Section]:
    """(quantization_config, `quantization` of hf_quant_config.json) as ModelOpt exports gpt-oss."""
    ignore = _short_ignore(writing.modules, writing.kept)
    section = _flat(writing.target, ignore)
    del section["group_size"]  # ModelOpt's own gpt-oss export has no such key here
    return section, _quantization(_algorithm(writing.target), ignore)


def _projections(writing: Writing) -> tuple[Section, Section]:
    """Like `_bank`, for projections: one algorithm with exceptions where that suffices, else a list of layers."""
    target, modules = writing.target, writing.modules
    if not writing.fp8 and _is_plain(modules, writing.kept):
        ignore = list(writing.kept)
        return _flat(target, ignore), _quantization(_algorithm(target), ignore)
    names = sorted({name for bank in _banks(modules) for name in _spellings(bank, target)})
    layers, groups = _layers(target, names), {"group_0": _group(target, names)}
    if writing.fp8:
        listed = _fp8_names(writing)
        layers |= {name: {"quant_algo": ALGORITHM} for name in listed}
        groups["group_1"] = {"quant_algo": ALGORITHM, "targets": listed}
    section = {
        "config_groups": groups,
        "group_size": NV_BLOCK,
        "ignore": [],
        "quant_algo": "MIXED_PRECISION",
        "quant_method": "modelopt_mixed",
        "quantized_layers": layers,
    }
    return section, _quantization("MIXED_PRECISION", [], layers)


def _fp8_names(writing: Writing) -> list[str]:
    """Every name under which an engine may look up a weight in FP8, or a matrix into which it merges several."""
    names, attention = list(writing.fp8), writing.target.family.attention
    for parent, merged in attention.among(writing.fp8) if attention else ():
        names += [f"{parent}.{name}" for name in merged.names]
    return sorted({each for name in names for each in _spellings(name, writing.target)})


def _beside_fp8(writing: Writing) -> tuple[Section, Section]:
    """Like `_bank`, for an FP8 checkpoint with NVFP4 experts: its own config, extended by a list of the experts."""
    target = writing.target
    names, ignore = _banks(writing.modules), list(target.family.beside_fp8)
    layers = _layers(target, names)
    old = find_quantization_config(writing.config).section
    section = {key: value for key, value in old.items() if key not in target.family.drops} | {
        "quant_method": "fp8",
        "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION",
        "group_size": NV_BLOCK,
        "ignore": ignore,
        "quantized_layers": layers,
        "config_groups": {"group_0": _group(target, names)},
    }
    return section, _quantization("MIXED_PRECISION", ignore, layers)


def _flat(target: Target, ignore: list[str]) -> Section:
    return {
        "config_groups": {"group_0": _group(target, ["Linear"])},
        "ignore": ignore,
        "quant_algo": _algorithm(target),
        "quant_method": "modelopt",
        "group_size": NV_BLOCK,
    }


def _quantization(algorithm: str, exclude: list[str], layers: Mapping[str, Section] | None = None) -> Section:
    return {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "group_size": NV_BLOCK,
        **({"quantized_layers": dict(layers)} if layers else {}),
        "exclude_modules": exclude,
    }


def _group(target: Target, targets: list[str]) -> Section:
    activations = {"input_activations": _args()} if target.activations == "w4a4" else {}
    return {**activations, "weights": _args(), "targets": targets}


def _args() -> Section:
    return {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NV_BLOCK}


def _layers(target: Target, names: Iterable[str]) -> dict[str, Section]:
    return {name: {"quant_algo": _algorithm(target), "group_size": NV_BLOCK} for name in names}


def _banks(modules: Iterable[str]) -> list[str]:
    """`...experts` for experts with names of their own, else the module itself; sorted, each once."""
    return sorted({_bank_of(module) or module for module in modules})


def _bank_of(module: str) -> str | None:
    expert = expert_projection(module)
    return expert[0] if expert and "." not in expert[1] else None


def _spellings(module: str, target: Target) -> list[str]:
    """Every name under which an engine may look up a module."""
    names = [module]
    for pattern, other in target.family.aliases:
        names += [re.sub(pattern, other, name) for name in names if re.search(pattern, name)]
    return names


def _is_plain(modules: Sequence[str], ignore: Collection[str]) -> bool:
    """Whether one algorithm and a list of exceptions suffices, as for dense models.

    vLLM also matches exceptions as substrings, so an exception that occurs in a cast module's name (a router `gate`
    beside `gate_proj`) needs the explicit list of `MIXED_PRECISION` instead.
    """
    if any(_bank_of(module) for module in modules) or len(modules) * len(ignore) > _PAIRS:
        return False
    text = "\n".join(modules)
    merged = {name for name in map(merged_module, modules) if name is not None}
    return not any(name in text or any(name in other for other in merged) for name in ignore)


def _short_ignore(modules: Sequence[str], kept: Iterable[str]) -> list[str]:
    """Exceptions as ModelOpt's gpt-oss export lists them: attention by a pattern if all of it stays, others by name."""
    touched = {module.partition(".self_attn.")[0] for module in modules if ".self_attn." in module}

    def entry(module: str) -> str:
        layer, attention, _ = module.partition(".self_attn.")
        return f"{layer}.self_attn*" if attention and layer not in touched else module

    return sorted({entry(module) for module in kept})
