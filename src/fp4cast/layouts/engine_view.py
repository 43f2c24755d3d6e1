"""What a destination's config tells an engine, read the way engines read it: is this module NVFP4, and which kind?

Part of the independent witness: `configs` writes these documents, this module only reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from fp4cast.checkpoints.quantization_config import manifest
from fp4cast.errors import CheckpointError, UnsupportedError

__all__ = ["Claims", "config_faults", "read_claims"]


@dataclass(frozen=True)
class Claims:
    """A quantization config's statements.

    Attributes:
        layout: "modelopt" or "compressed-tensors".
        activations: "w4a16" or "w4a4".
        layers: the modules listed as NVFP4; None where everything is that is not ignored.
        ignore: names and patterns that are not quantized.
    """

    layout: str
    activations: str
    layers: frozenset[str] | None
    ignore: tuple[str, ...]

    def quantized(self, module: str) -> bool:
        """Whether an engine would load the module as NVFP4."""
        if self.layers is not None:
            return any(name in self.layers for name in _ancestors(module))
        return not any(self._matches(entry, module) for entry in self.ignore)

    def _matches(self, entry: str, module: str) -> bool:
        if self.layout == "compressed-tensors":
            return entry == module or (entry.startswith("re:") and _pattern(entry[3:]).match(module) is not None)
        # vLLM takes a ModelOpt entry for a wildcard and for a plain substring.
        return entry in module or fnmatchcase(module, entry)


_ENDLESS = re.compile(r"[*+}]\)*\)[*+{]")  # (a+)+ and its kin


@lru_cache(maxsize=4096)
def _pattern(text: str) -> re.Pattern[str]:
    if _ENDLESS.search(text):
        raise CheckpointError(f"the config ignores 're:{text[:100]}', a nested repetition that may match for ever")
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"the config ignores 're:{text[:100]}', which is no pattern: {error}") from error


def _ancestors(module: str) -> Iterator[str]:
    """A module and the banks that hold it, as loaders look them up."""
    yield module
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _w4a4(groups: object) -> bool:
    """Whether the NVFP4 group (weights in blocks of 16) of a compressed-tensors config quantizes activations."""
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("num_bits") == 4 and weights.get("group_size") == 16:
            return bool(group.get("input_activations"))
    return False


def read_claims(config: Mapping[str, Any]) -> Claims:
    """What a config.json claims.

    Raises:
        UnsupportedError: it does not describe an NVFP4 checkpoint of a layout that fp4cast writes.
    """
    section = manifest(config)[1]
    method, algorithm = section.get("quant_method"), section.get("quant_algo")
    ignore = _strings(section.get("ignore"))
    if method == "compressed-tensors" and section.get("format") in ("nvfp4-pack-quantized", "mixed-precision"):
        activations = "w4a4" if _w4a4(section.get("config_groups")) else "w4a16"
        return Claims("compressed-tensors", activations, None, ignore)
    if algorithm in ("NVFP4", "W4A16_NVFP4") and method == "modelopt":
        return Claims("modelopt", "w4a4" if algorithm == "NVFP4" else "w4a16", None, ignore)
    layers = section.get("quantized_layers")
    mixed = method in ("modelopt", "modelopt_mixed") or (method == "fp8" and section.get("moe_quant_algo") == "NVFP4")
    if mixed and algorithm == "MIXED_PRECISION" and isinstance(layers, dict) and layers:
        kinds = {str(layer.get("quant_algo")) if isinstance(layer, dict) else "" for layer in layers.values()}
        if kinds in ({"NVFP4"}, {"W4A16_NVFP4"}):
            return Claims("modelopt", "w4a4" if kinds == {"NVFP4"} else "w4a16", frozenset(layers), ignore)
    raise UnsupportedError(
        f"the config describes no NVFP4 checkpoint that fp4cast writes: quant_method {method!r}, "
        f"quant_algo {algorithm!r}, format {section.get('format')!r}"
    )


def config_faults(config: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Iterable[str]:
    """Where config.json and hf_quant_config.json contradict each other or leave the source's manifest behind.

    Args:
        config: config.json.
        beside: hf_quant_config.json, or None where there is none.
    """
    path, section = manifest(config)
    others = [key for key, value in config.items() if isinstance(value, dict) and (key,) != path and manifest(value)[1]]
    if len(path) == 1 and others:
        yield f"a second quantization_config is left under {others[0]!r}"
    if section.get("quant_method") == "compressed-tensors":
        return
    quantization = beside.get("quantization") if beside is not None else None
    if not isinstance(quantization, dict):
        yield "hf_quant_config.json has no `quantization` object"
        return
    twins = (("quant_algo", "quant_algo"), ("exclude_modules", "ignore"), ("quantized_layers", "quantized_layers"))
    for key, twin in twins:
        if quantization.get(key) != section.get(twin):
            yield f"hf_quant_config.json's {key} differs from config.json's {twin}"
    if quantization.get("group_size") != 16:
        yield f"hf_quant_config.json's group_size is {quantization.get('group_size')!r}, expected 16"
