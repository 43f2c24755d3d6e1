"""The page's pictures, drawn from the study's document by matplotlib (extra `study`).

They are as narrow as a telephone, where they are read without zooming, and each brings its colours for dark pages.
"""

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
_INK, _GRID, _PAPER, _FIELD, _BAR = "#222222", "#e4e4e4", "#ffffff", "#e6f3ec", "#dbe9f4"
_SHADES = (_GRID, "#8fd0ae", _COLORS["4"])
_DARK = {
    _INK: "#dddddd", _GRID: "#363b40", _PAPER: "#15181b", _FIELD: "#1b3329", _BAR: "#22384c", "#8fd0ae": "#2c6a4b",
    "#8c8c8c": "#9d9d9d", "#c8643c": "#dd7a52", "#2f6fae": "#4f94d8", "#1a8a5a": "#35b57d",
}  # fmt: skip
_TOP_DB = 190  # what is better is drawn here, short of "exact"
_WIDTH, _ROW = 4.5, 0.56  # inches
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "fp4cast",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.2,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}

Document = dict[str, Any]


def _figure(pyplot: Any, height: float, left: float, above: float) -> tuple[Any, Any]:
    """(figure, axes), by the height in inches and the room left of the axes, and above them for the legend."""
    figure, axes = pyplot.subplots(figsize=(_WIDTH, height))
    figure.subplots_adjust(left=left / _WIDTH, right=1 - 0.12 / _WIDTH, bottom=0.62 / height, top=1 - above / height)
    axes.tick_params(length=0)
    return figure, axes


def told(document: Document) -> tuple[list[Document], list[Document]]:
    """The scenarios that are worth a row, and those that every algorithm casts exactly but the first."""
    alike = [
        each
        for each in document["scenarios"]
        if all(result["exact"] for name, result in each["algorithms"].items() if name != "1")
    ]
    return [each for each in document["scenarios"] if each not in alike], alike


def _legend(axes: Any, above: float) -> None:
    handles = [axes.scatter([], [], color=_COLORS[name], marker=_MARKERS[name], s=42, label=name) for name in TITLES]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, above), ncols=3)


def _chart(pyplot: Any, rows: list[str], label: str) -> tuple[Any, Any]:
    """(figure, axes) with a line for each row, its name above its marks, and the axis at both ends."""
    height = _ROW * len(rows) + 1.5
    figure, axes = _figure(pyplot, height, 0.12, 0.88)
    for i, name in enumerate(rows):
        axes.text(0, 0.32 - i, name, transform=axes.get_yaxis_transform(), va="center")
        axes.axhline(-0.5 - i, color=_GRID, linewidth=0.8)
    axes.set_ylim(0.5 - len(rows), 0.5)
    axes.set_yticks([])
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.tick_params(labeltop=True)
    axes.set_xlabel(label)
    _legend(axes, 1 + 0.28 / (_ROW * len(rows)))
    return figure, axes


def _heights(row: int) -> Iterator[tuple[str, float]]:
    """(algorithm, the height of its mark in a row): equal values lie one below the other, and stay visible."""
    for i, name in enumerate(TITLES):
        yield name, 0.08 - 0.09 * i - row


def _mark(axes: Any, name: str, x: float, y: float, hollow: bool = False) -> None:
    face = _PAPER if hollow else _COLORS[name]
    axes.scatter(x, y, s=36, facecolor=face, edgecolor=_COLORS[name], marker=_MARKERS[name], linewidth=1, zorder=3)


def _ranges(axes: Any, row: int, values: dict[str, list[float]], hollow: str = "") -> None:
    """Many scenarios in one row: from the least to the most of each algorithm."""
    for name, y in _heights(row):
        ends = min(values[name]), max(values[name])
        axes.plot(ends, [y, y], color=_COLORS[name], linewidth=2)
        for x in sorted(set(ends)):
            _mark(axes, name, x, y, hollow=name == hollow)


def _rows(document: Document, limit: float) -> tuple[list[Document], list[Document], list[str]]:
    """Those of `told` with a spread below a limit, and the names of their rows; the last is that of all others."""
    own, alike = ([each for each in part if each["spread"] < limit] for part in told(document))
    return own, alike, [each["name"] for each in own] + [f"the other {len(alike)}, least to most"] * bool(alike)


def snr(pyplot: Any, document: Document) -> Any:
    """Signal to noise by scenario and algorithm; exact results stand in a column of their own."""
    own, alike, names = _rows(document, math.inf)
    figure, axes = _chart(pyplot, names, "signal to noise, dB (right is better)")
    exact_at = _TOP_DB + 22

    def place(scenario: Document, name: str) -> float:
        result = scenario["algorithms"][name]
        return exact_at if result["exact"] else float(min(result["snr_db"], _TOP_DB))

    axes.axvspan(exact_at - 12, exact_at + 12, color=_FIELD, linewidth=0)
    for i, scenario in enumerate(own):
        for name, y in _heights(i):
            _mark(axes, name, place(scenario, name), y)
    if alike:
        _ranges(axes, len(own), {name: [place(each, name) for each in alike] for name in TITLES})
    ticks = list(range(0, 161, 40))
    axes.set_xticks([*ticks, exact_at], [*map(str, ticks), "exact"])
    axes.set_xlim(-8, exact_at + 12)
    return figure


def spread(pyplot: Any, document: Document) -> Any:
    """Relative error against the spread of the exponents."""
    curve = document["spread_curve"]
    figure, axes = _figure(pyplot, 4.6, 0.55, 0.62)
    floor = 1e-9
    axes.axhspan(floor / 3, floor * 3, color=_FIELD, linewidth=0)
    axes.axvline(17.5, color=_COLORS["1"], linewidth=1, linestyle=":")
    axes.text(18.3, 2.5, "the window ends", color=_COLORS["1"])
    for name in TITLES:
        points = [(int(x), max(errors[name], floor)) for x, errors in curve.items()]
        (x, y), width = zip(*points, strict=True), 4 if name in ("3", "2-midpoint") else 2
        shown = slice(4 * list(TITLES).index(name) % 11, None, 11)  # a mark now and then, for who sees no colours
        axes.plot(x, y, color=_COLORS[name], linewidth=width)
        axes.scatter(x[shown], y[shown], color=_COLORS[name], marker=_MARKERS[name], s=36, zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(floor / 3, 10)
    powers = range(-8, 1, 2)
    axes.set_yticks([floor, *(10.0**i for i in powers)], ["exact", *(f"10$^{{{i}}}$" for i in powers)])
    axes.minorticks_off()
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_xlabel("spread: binades from the smallest block to the largest")
    _legend(axes, 1.0)
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
    row = 0.4
    figure, axes = _figure(pyplot, row * len(lines) + 1.5, 0.12, 0.88)
    for i, line in enumerate(lines):
        largest, many = max(alike[line], key=int.bit_count), len(alike[line])
        name = _set_name(largest) if many == 1 else f"{many} sets, the largest {_set_name(largest)}"
        axes.text(0, 0.3 - i, name, transform=axes.get_yaxis_transform(), va="center")
        for offset, letter in zip(OFFSETS, line, strict=True):
            axes.barh(-0.18 - i, 0.94, height=0.42, left=offset - 0.47, color=_SHADES[".sv".index(letter)])
    axes.set_ylim(0.5 - len(lines), 0.5)
    axes.set_yticks([])
    axes.set_xlim(OFFSETS.start - 0.5, OFFSETS.stop - 0.5)
    axes.set_xticks([-12, -9, -4, 0, 4, 8, 11])
    axes.tick_params(labeltop=True)
    axes.set_xlabel("k − m: the block's exponent over that of the tensor scale")
    patch = require("matplotlib.patches", "study").Patch
    words = ("not exact", "shifted, exact", "codes kept")
    handles = [patch(color=color, label=label) for color, label in zip(_SHADES, words, strict=True)]
    above = 1 + 0.28 / (row * len(lines))
    axes.legend(handles=handles[::-1], loc="lower center", bbox_to_anchor=(0.5, above), ncols=3)
    return figure


def landing(pyplot: Any, document: Document) -> Any:
    """Where each algorithm puts its tensor scale, seen from the largest block."""
    own, alike, names = _rows(document, 100)
    figure, axes = _chart(pyplot, names, "log₂ S − k_max")

    def place(scenario: Document, name: str) -> float:
        return math.log2(scenario["algorithms"][name]["tensor_scale"]) - float(scenario["k_max"])

    axes.axvline(-8, color=_COLORS["3"], linewidth=1, linestyle=":")
    for i, scenario in enumerate(own):
        low, high = (m - scenario["k_max"] for m in scenario["sweep_best_m"])
        box = {"color": _BAR, "linewidth": 24, "solid_capstyle": "butt", "zorder": 0.5}
        axes.plot([low - 0.3, high + 0.3], [-0.145 - i] * 2, **box)
        for name, y in _heights(i):
            _mark(axes, name, place(scenario, name), y, hollow=scenario["algorithms"][name]["m"] is None)
    if alike:
        _ranges(axes, len(own), {name: [place(each, name) for each in alike] for name in TITLES}, hollow="1")
    return figure


PLOTS: dict[str, Callable[[Any, Document], Any]] = {
    "snr": snr,
    "spread": spread,
    "exactness": exactness,
    "landing": landing,
}


def _dark(svg: str) -> str:
    """With rules for dark pages: matplotlib writes each colour into the style of what has it."""
    rules = [
        f'[style*="{what}: {color}"]{{{what}: {dark} !important}}'
        for color, dark in _DARK.items()
        for what in ("fill", "stroke")
        if f"{what}: {color}" in svg
    ]
    return svg.replace("</style>", "\n@media (prefers-color-scheme: dark) {" + "\n".join(["", *rules]) + "}</style>", 1)


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
            figure.savefig(text, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            drawn[name] = _dark("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")
    return drawn
