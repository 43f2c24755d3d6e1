"""Find and replace a config's quantization_config, at the top or one level down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """The first quantization_config of a config.json that says something."""
    return next((found for found in _all(config) if found.section), QuantizationConfig((), {}))


def _all(config: Mapping[str, Any]) -> Iterator[QuantizationConfig]:
    """Every quantization_config at the top or one level down; null is an empty one, as transformers reads it."""
    scopes = [((), config)] + [((key,), value) for key, value in config.items() if isinstance(value, dict)]
    for path, scope in scopes:
        for key in _KEYS:
            if key in scope and isinstance(found := scope[key], dict | None):
                yield QuantizationConfig((*path, key), found or {})


def misplaced_quantization_configs(config: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about each quantization_config that is no object, or that lies deeper than engines look."""
    scopes: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), config)]
    for path, scope in scopes:  # which grows
        for key, value in scope.items():
            if key in _KEYS and value is not None:
                where = ".".join((*path, key))[:200]
                if not isinstance(value, dict):
                    yield f"{where} is {str(value)[:200]!r}, expected an object"
                elif len(path) > 1:
                    yield f"{where} is too deep, expected a quantization_config at the top or one level down"
            elif isinstance(value, dict):
                scopes.append(((*path[:2], key[:100]), value))


def drop_quantization_configs(config: dict[str, Any]) -> None:
    """Remove every quantization_config in place; a leftover one would make a loader read NVFP4 as MXFP4."""
    for path, _ in list(_all(config)):
        if (scope := _scope(config, path)) is not None:
            del scope[path[-1]]


def set_quantization_config(config: dict[str, Any], section: dict[str, Any]) -> None:
    """Put a quantization_config where the first one is, in place, and remove all others."""
    path = find_quantization_config(config).path or _KEYS[:1]
    drop_quantization_configs(config)
    if (scope := _scope(config, path)) is not None:
        scope[path[-1]] = section


def _scope(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """What holds the last key of a path; None where it was part of something that has been removed."""
    return config if len(path) == 1 else config.get(path[0])
