"""Read a checkpoint's config as engines do: which modules are NVFP4, and of which kind?

This is the counterpart of the layouts' files: each of them writes its documents, and a function here reads them.
`engine_rules` says what else their keys must say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fp4cast.checkpoints.directory import CONFIG
from fp4cast.checkpoints.quantization_config import find_quantization_config
from fp4cast.errors import CheckpointError, UnsupportedError
from fp4cast.formats import NV_BLOCK, Activations
from fp4cast.layouts.fp8 import ALGORITHM
from fp4cast.layouts.patterns import PatternError, names_and_expressions, substrings_and_wildcards


@dataclass(frozen=True)
class Claims:
    """The claims of a quantization_config.

    Attributes:
        layout: the name of the layout.
        activations: "w4a16" or "w4a4".
        layers: the modules listed as NVFP4; None if every module is that is not ignored.
        ignore: names and patterns that are not quantized.
        ignores: returns the modules that entries of `ignore` mean: (entries, modules).
        other_groups: modules in other formats have groups of their own, beside `ignore`.
        path: the config file, which errors name.
        kv_cache: it asks for a quantized KV cache.
        fp8: the modules listed as FP8 in blocks.
    """

    layout: str
    activations: Activations
    layers: frozenset[str] | None
    ignore: tuple[str, ...]
    ignores: Callable[[Iterable[str], Sequence[str]], set[str]]
    other_groups: bool = False
    path: Path = Path(CONFIG)
    kv_cache: bool = False
    fp8: frozenset[str] = frozenset()

    def quantized(self, modules: Iterable[str]) -> set[str]:
        """Those of the modules that an engine would load as NVFP4.

        Raises:
            CheckpointError: an entry of `ignore` is not a valid pattern, or takes too long to match.
        """
        names = list(modules)
        if self.layers is not None:
            return {name for name in names if not self.layers.isdisjoint(ancestors(name))}
        try:
            return set(names) - self.ignores(self.ignore, names)
        except PatternError as error:
            raise CheckpointError(f"{self.path}: {error}") from error


def read_claims(config: Mapping[str, Any], path: Path = Path(CONFIG)) -> Claims:
    """Read the claims of a config.json.

    Args:
        config: what it holds.
        path: the file, which errors name.

    Raises:
        UnsupportedError: it does not describe an NVFP4 checkpoint of a layout that fp4cast writes.
    """
    section = find_quantization_config(config).section
    for clause in _CLAUSES:
        if (claims := clause(section)) is not None:
            return replace(claims, path=path, kv_cache=section.get("kv_cache_scheme") is not None)
    if not section:
        raise UnsupportedError(
            f"{path}: the config describes no NVFP4 checkpoint, and no quantization at all. `fp4cast verify SRC DST` "
            "compares an MXFP4 source with what `fp4cast convert` made of it"
        )
    raise UnsupportedError(
        f"{path}: the config describes no NVFP4 checkpoint that fp4cast writes: quant_method "
        f"{section.get('quant_method')!r}, quant_algo {section.get('quant_algo')!r}, format {section.get('format')!r}"
    )


def _compressed_tensors(section: Mapping[str, Any]) -> Claims | None:
    if section.get("quant_method") != "compressed-tensors":
        return None
    if section.get("format") not in ("nvfp4-pack-quantized", "mixed-precision"):
        return None
    activations: Activations = "w4a4" if _w4a4(section.get("config_groups")) else "w4a16"
    ignore = _strings(section.get("ignore"))
    return Claims("compressed-tensors", activations, None, ignore, names_and_expressions, other_groups=True)


def _modelopt(section: Mapping[str, Any]) -> Claims | None:
    activations = _ALGORITHMS.get(str(section.get("quant_algo")))
    if activations is None or section.get("quant_method") != "modelopt":
        return None
    return Claims("modelopt", activations, None, _strings(section.get("ignore")), substrings_and_wildcards)


def _modelopt_mixed(section: Mapping[str, Any]) -> Claims | None:
    method, layers = section.get("quant_method"), section.get("quantized_layers")
    mixed = method in ("modelopt", "modelopt_mixed") or (method == "fp8" and section.get("moe_quant_algo") == "NVFP4")
    if not mixed or section.get("quant_algo") != "MIXED_PRECISION" or not isinstance(layers, dict):
        return None
    said = {name: str(layer.get("quant_algo")) if isinstance(layer, dict) else "" for name, layer in layers.items()}
    fp8 = frozenset(name for name, algorithm in said.items() if algorithm == ALGORITHM)
    algorithms = set(said.values()) - {ALGORITHM}
    activations = _ALGORITHMS.get(algorithms.pop()) if len(algorithms) == 1 else None
    if activations is None:
        return None
    ignore, named = _strings(section.get("ignore")), frozenset(layers) - fp8
    return Claims("modelopt", activations, named, ignore, substrings_and_wildcards, fp8=fp8)


_ALGORITHMS: dict[str, Activations] = {"NVFP4": "w4a4", "W4A16_NVFP4": "w4a16"}
_CLAUSES = (_compressed_tensors, _modelopt, _modelopt_mixed)


def ancestors(module: str) -> Iterator[str]:
    """A module and the banks that hold it, as loaders look them up."""
    yield module
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


def first_below(module: str, names: Sequence[str]) -> str | None:
    """The first of some sorted names that lies below a module."""
    at = bisect_left(names, f"{module}.")
    return names[at] if at < len(names) and names[at].startswith(f"{module}.") else None


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _w4a4(groups: object) -> bool:
    """Whether the NVFP4 group (weights in blocks of 16) of a compressed-tensors config quantizes activations."""
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and _is_nvfp4(weights):
            return bool(group.get("input_activations"))
    return False


def _is_nvfp4(weights: Mapping[str, Any]) -> bool:
    return (weights.get("num_bits"), weights.get("type"), weights.get("group_size")) == (4, "float", NV_BLOCK)
