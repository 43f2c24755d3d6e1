"""A config's quantization manifest, wherever it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["drop_manifests", "manifest"]


def manifest(config: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(path of keys, quantization_config) of a config, top-level or one level down; empty where there is none."""
    candidates = [((), config)] + [((key,), value) for key, value in config.items() if isinstance(value, dict)]
    for path, scope in candidates:
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := scope.get(key), dict):
                return (*path, key), found
    return (), {}


def drop_manifests(config: dict[str, Any]) -> None:
    """Remove every quantization_config in place; one that is left would make a loader read NVFP4 as MXFP4."""
    while path := manifest(config)[0]:
        scope = config
        for key in path[:-1]:
            scope = scope[key]
        del scope[path[-1]]
