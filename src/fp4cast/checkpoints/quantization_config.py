"""Find and replace a config's quantization_config, at the top or one level down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_KEYS = ("quantization_config", "compression_config")


class QuantizationConfig(NamedTuple):
    """A quantization_config and its place; both empty where a config has none.

    Attributes:
        path: the keys that lead to it.
        section: its entries.
    """

    path: tuple[str, ...]
    section: dict[str, Any]


def find_quantization_config(config: Mapping[str, Any]) -> QuantizationConfig:
    """The first quantization_config of a config.json."""
    scopes = [((), config)] + [((key,), value) for key, value in config.items() if isinstance(value, dict)]
    for path, scope in scopes:
        for key in _KEYS:
            if isinstance(found := scope.get(key), dict):
                return QuantizationConfig((*path, key), found)
    return QuantizationConfig((), {})


def drop_quantization_configs(config: dict[str, Any]) -> None:
    """Remove every quantization_config in place; a leftover one would make a loader read NVFP4 as MXFP4."""
    while path := find_quantization_config(config).path:
        del _scope(config, path)[path[-1]]


def set_quantization_config(config: dict[str, Any], section: dict[str, Any]) -> None:
    """Put a quantization_config where the first one is, in place, and remove all others."""
    path = find_quantization_config(config).path or _KEYS[:1]
    drop_quantization_configs(config)
    _scope(config, path)[path[-1]] = section


def _scope(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path[:-1]:
        config = config[key]
    return config
