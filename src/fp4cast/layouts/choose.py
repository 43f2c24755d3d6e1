"""The table of layouts, and the choice of one for a family."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from fp4cast.errors import UsageError
from fp4cast.families.family import Family
from fp4cast.formats import Activations
from fp4cast.layouts.compressed_tensors import COMPRESSED_TENSORS
from fp4cast.layouts.kv_cache import find_kv_cache
from fp4cast.layouts.layout import Layout, Target
from fp4cast.layouts.modelopt import MODELOPT

LayoutName = Literal["modelopt", "compressed-tensors"]
ConvertLayout = Literal[LayoutName, "mlx"]  # the last for sources of MLX alone: see `layouts.mlx`
LAYOUTS: tuple[Layout, ...] = (MODELOPT, COMPRESSED_TENSORS)
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
DEFAULT_LAYOUT: LayoutName = "modelopt"


def find_layout(name: str) -> Layout:
    """The layout of that name.

    Raises:
        UsageError: there is none.
    """
    found = next((layout for layout in LAYOUTS if layout.name == name), None)
    if found is None:
        raise UsageError(f"unknown layout {name!r}; expected {' or '.join(layout.name for layout in LAYOUTS)}")
    return found


def find_activations(name: str | None) -> Activations:
    """The activations of that name; None for w4a16.

    Raises:
        UsageError: there are none.
    """
    found = next((each for each in ACTIVATIONS if name in (None, each)), None)
    if found is None:
        raise UsageError(f"unknown activations {name!r}; expected {' or '.join(ACTIVATIONS)}")
    return found


def choose_target(
    family: Family,
    layout: str = DEFAULT_LAYOUT,
    activations: str | None = None,
    path: Path | None = None,
    kv_cache: str = "none",
) -> Target:
    """The target for a family.

    Args:
        family: of the source.
        layout: the name of one of `LAYOUTS`.
        activations: one of `ACTIVATIONS`; None for w4a16 where the family can be served so.
        path: the source, which errors name.
        kv_cache: one of `KV_CACHES`.

    Raises:
        UsageError: the family has no such layout, or cannot be served with such activations or such a KV cache.
    """
    found, wanted, cache = find_layout(layout), find_activations(activations), find_kv_cache(kv_cache)
    where = "" if path is None else f"{path}: "
    if layout not in family.layouts:
        others = " or ".join(f"--layout {name}" for name in family.layouts)
        raise UsageError(f"{where}no engine reads {family.title} in the {layout} layout; use {others}")
    if wanted not in family.activations:
        served = " or ".join(each.upper() for each in family.activations)
        raise UsageError(f"{where}engines serve NVFP4 {family.title} as {served} only. {family.hint}".rstrip())
    if cache != "none" and not family.kv_cache:
        raise UsageError(
            f"{where}engines keep the KV cache of {family.title} in a format of their own, whatever a checkpoint asks "
            f"for; drop --kv_cache_qformat {kv_cache}"
        )
    return Target(found, wanted, family, cache)


def targets_of(family: Family) -> list[Target]:
    """Every target that a family has, in the order of `LAYOUTS` and `ACTIVATIONS`."""
    return [
        Target(layout, activations, family)
        for layout in LAYOUTS
        if layout.name in family.layouts
        for activations in ACTIVATIONS
        if activations in family.activations
    ]
