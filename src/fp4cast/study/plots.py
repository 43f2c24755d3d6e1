"""The page's pictures, drawn from the study's document by matplotlib (extra `study`)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Any

from fp4cast.extras import require
from fp4cast.formats import E2M1
from fp4cast.study.algorithms import TITLES
from fp4cast.study.brute_force import OFFSETS, SETS

_COLORS = {
    "1": "#8c8c8c",
    "2-midpoint": "#d9a441",
    "2-search": "#c8643c",
    "3-sweep": "#7fb2d9",
    "3": "#2f6fae",
    "4": "#1a8a5a",
}
_MARKERS = {"1": "X", "2-midpoint": "v", "2-search": "^", "3-sweep": "s", "3": "D", "4": "o"}
_SHADES = ("#ededed", "#8fd0ae", "#1a8a5a")
_TOP_DB = 190  # what is better is drawn here, short of "exact"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "fp4cast",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}

Document = dict[str, Any]


def _rows(axes: Any, scenarios: list[Document]) -> list[float]:
    """Name the rows of a chart, the originals first; returns their heights."""
    heights = [-i - (0 if each["original"] else 1.2) for i, each in enumerate(scenarios)]
    axes.set_yticks(heights, [each["name"] for each in scenarios])
    axes.set_ylim(min(heights) - 0.8, 0.8)
    axes.grid(axis="both", color="#ececec", linewidth=0.8)
    axes.tick_params(length=0)
    return heights


def _legend(axes: Any, names: list[str], **more: Any) -> None:
    handles = [
        axes.scatter([], [], color=_COLORS[name], marker=_MARKERS[name], s=30, label=f"{name}: {TITLES[name]}")
        for name in names
    ]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, **more)


def _chart(pyplot: Any, scenarios: list[Document]) -> Any:
    """(figure, axes) with a row for each scenario."""
    return pyplot.subplots(figsize=(9.5, 0.27 * len(scenarios) + 1.6))


def _marks(scenario: Document) -> Iterator[tuple[str, Document, float]]:
    """(algorithm, its result, how far its mark stands above the row), so that equal values stay visible."""
    for i, (name, result) in enumerate(scenario["algorithms"].items()):
        yield name, result, 0.14 * ((len(TITLES) - 1) / 2 - i)


def snr(pyplot: Any, document: Document) -> Any:
    """Signal to noise by scenario and algorithm; exact results stand in a column of their own."""
    scenarios = document["scenarios"]
    figure, axes = _chart(pyplot, scenarios)
    exact_at = _TOP_DB + 22
    axes.axvspan(exact_at - 12, exact_at + 12, color="#e6f3ec", linewidth=0)
    for height, scenario in zip(_rows(axes, scenarios), scenarios, strict=True):
        for name, result, above in _marks(scenario):
            # Among exact results there is nothing to measure: they stand side by side.
            x, y = (
                (exact_at - 28 * above, height) if result["exact"] else (min(result["snr_db"], _TOP_DB), height + above)
            )
            axes.scatter(x, y, color=_COLORS[name], marker=_MARKERS[name], s=15, linewidth=0)
    ticks = list(range(0, 161, 20))
    axes.set_xticks([*ticks, exact_at], [*map(str, ticks), "exact"])
    axes.set_xlim(-8, exact_at + 12)
    axes.set_xlabel("signal to noise, dB (right is better)")
    _legend(axes, list(TITLES))
    return figure


def spread(pyplot: Any, document: Document) -> Any:
    """Relative error against the spread of the exponents."""
    curve = document["spread_curve"]
    figure, axes = pyplot.subplots(figsize=(9.5, 4.6))
    floor = 1e-9
    axes.axhspan(floor / 3, floor * 3, color="#e6f3ec", linewidth=0)
    axes.axvline(17.5, color="#b0b0b0", linewidth=0.8, linestyle=":")
    axes.text(17.8, 3, "the window ends", color="#707070", fontsize=8)
    for name in TITLES:
        points = [(int(x), max(errors[name], floor)) for x, errors in curve.items()]
        width = 3.2 if name in ("3", "2-midpoint") else 1.6
        axes.plot(*zip(*points, strict=True), color=_COLORS[name], linewidth=width, label=f"{name}: {TITLES[name]}")
    axes.set_yscale("log")
    axes.set_ylim(floor / 3, 10)
    axes.set_yticks(
        [floor, *(10.0**i for i in range(-8, 1, 2))], ["exact", *(f"10$^{{{i}}}$" for i in range(-8, 1, 2))]
    )
    axes.minorticks_off()
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_xlabel("spread: binades between the largest and the smallest block (uniform between them)")
    axes.set_ylabel("root mean square error / root mean square value")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def _set_name(members: int) -> str:
    return (
        "{" + ", ".join(f"{value:g}".lstrip("0") for i, value in enumerate(E2M1.values[1:8]) if members >> i & 1) + "}"
    )


def exactness(pyplot: Any, document: Document) -> Any:
    """Every set of magnitudes at every offset: kept, shifted, or lost. Sets that fare alike share a line."""
    alike: dict[str, list[int]] = {}
    for members, line in zip(SETS, document["exactness_map"], strict=True):
        alike.setdefault(line, []).append(members)
    lines = sorted(alike, key=lambda line: (len(line.replace(".", "")), line), reverse=True)
    shade = {"v": 2, "s": 1, ".": 0}
    figure, axes = pyplot.subplots(figsize=(9.5, 4.4))
    colors = require("matplotlib.colors", "study").ListedColormap(_SHADES)
    extent = (OFFSETS.start - 0.5, OFFSETS.stop - 0.5, len(lines), 0)
    pixels = [[shade[letter] for letter in line] for line in lines]
    axes.imshow(pixels, cmap=colors, vmin=0, vmax=2, extent=extent, aspect="auto", interpolation="none")
    for edge in range(1, len(lines)):
        axes.axhline(edge, color="white", linewidth=2)
    names = [_set_name(max(alike[line], key=lambda members: members.bit_count())) for line in lines]
    labels = [
        f"{name}" if len(alike[line]) == 1 else f"{len(alike[line])} sets, as {name}"
        for name, line in zip(names, lines, strict=True)
    ]
    axes.set_yticks([i + 0.5 for i in range(len(lines))], labels)
    axes.tick_params(length=0)
    axes.set_xticks(list(OFFSETS)[::2])
    axes.set_xlabel("k − m: the block's exponent over that of the tensor scale")
    patch = require("matplotlib.patches", "study").Patch
    words = ("not exact", "codes shifted, exact", "codes kept")
    handles = [patch(color=color, label=label) for color, label in zip(_SHADES, words, strict=True)]
    axes.legend(handles=handles[::-1], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def landing(pyplot: Any, document: Document) -> Any:
    """Where each algorithm puts its tensor scale, seen from the largest block."""
    scenarios = [each for each in document["scenarios"] if each["spread"] < 100]
    figure, axes = _chart(pyplot, scenarios)
    axes.axvline(-8, color="#2f6fae", linewidth=0.8, linestyle=":")
    for height, scenario in zip(_rows(axes, scenarios), scenarios, strict=True):
        low, high = (m - scenario["k_max"] for m in scenario["sweep_best_m"])
        axes.plot([low, high], [height, height], color="#dbe9f4", linewidth=9, solid_capstyle="round", zorder=0.5)
        for name, result, above in _marks(scenario):
            x = math.log2(result["tensor_scale"]) - scenario["k_max"]
            face = _COLORS[name] if result["m"] is not None else "white"
            axes.scatter(
                x, height + above, facecolor=face, edgecolor=_COLORS[name], marker=_MARKERS[name], s=15, linewidth=0.8
            )
    axes.set_xlabel("log₂ S − k_max (dotted: −8; bars: where Algorithm 3 errs least; hollow: S is no power of two)")
    _legend(axes, list(TITLES))
    return figure


PLOTS: dict[str, Callable[[Any, Document], Any]] = {
    "snr": snr,
    "spread": spread,
    "exactness": exactness,
    "landing": landing,
}


def draw(document: Document) -> dict[str, str]:
    """All pictures as SVG, by name.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "study")
    matplotlib.use("svg")
    pyplot = require("matplotlib.pyplot", "study")
    drawn = {}
    with pyplot.rc_context(_STYLE):
        for name, plot in PLOTS.items():
            figure, text = plot(pyplot, document), io.StringIO()
            figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            drawn[name] = "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
    return drawn
