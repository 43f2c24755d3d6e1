"""The card's picture: the exponents of each layer beside both windows, as an SVG of 400 pixels' width.

It needs no style sheet, no font and no script, and has a background of its own, for bright pages and dark ones. Colours
are those of Okabe and Ito; each has a texture or a shape of its own, too, and darker means more everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from fp4cast.cards.subject import Layer, ScaleDomain, layers, shares
from fp4cast.casting.tight_rule import MARLIN_BINADES, WINDOW

_WIDTH = 400
_LEFT, _RIGHT, _TOP = 42, 372, 74  # the edges of the chart
_ROWS = 128  # more layers share rows
_WIDEST = 39  # binades; what lies further down is drawn here
_BLUE, _ORANGE, _RED, _INK, _FAINT = "#0072B2", "#E69F00", "#D55E00", "#222222", "#D9D9D9"

# The textures: none, one set of diagonals, two.
_TILE = '<pattern id="{}" width="5" height="5" patternUnits="userSpaceOnUse"><path d="{}" stroke="{}"/></pattern>'
_DEFS = "\n".join(
    [
        "<defs>",
        _TILE.format("one", "M-1 1L1-1M0 5L5 0M4 6L6 4", _INK),
        _TILE.format("two", "M0 0L5 5M0 5L5 0", _INK),
        "</defs>",
    ]
)

_MARLIN, _DISK, _BEYOND = (
    (_BLUE, "", f"to {MARLIN_BINADES} binades: exact on disk and in Marlin"),
    (_ORANGE, "one", f"to {WINDOW}: exact on disk"),
    (_RED, "two", "beyond: exact only where the codes leave room"),
)


def describe(domains: Sequence[ScaleDomain]) -> str:
    """The picture in a sentence, for who cannot see it."""
    spreads = [domain.scaling.spread for domain in domains]
    disk, marlin = (sum(spread <= limit for spread in spreads) for limit in (WINDOW, MARLIN_BINADES))
    return (
        f"The exponents of {len(spreads):,} scale domains span at most {max(spreads)} binades; {disk:,} fit the window "
        f"of {WINDOW} on disk, {marlin:,} that of {MARLIN_BINADES} in Marlin."
    )


def draw(domains: Sequence[ScaleDomain]) -> str:
    """The picture as SVG, the same on every machine."""
    rows = layers(domains, _ROWS)
    widest = max((min(domain.scaling.spread, _WIDEST) for domain in domains), default=0)
    columns = max(widest, WINDOW + 2) + 1
    unit = (_RIGHT - _LEFT) // columns
    height = 14 if len(rows) <= 36 else 9 if len(rows) <= 64 else 6
    bottom = _TOP + max(height * len(rows), 28)
    below = bottom + 48
    chart = [
        *_frame(unit, columns, bottom),
        *(part for i, row in enumerate(rows) for part in _row(row, _TOP + i * height, height, unit)),
        *_lines(unit, bottom),
        *_labels(rows, height),
    ]
    legend = [*_legend(domains, below)]
    size = below + 17 * legend.count("") - 3
    whole = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{size}" viewBox="0 0 {_WIDTH} {size}" '
        'role="img" font-family="Helvetica, Arial, sans-serif">',
        "<title>Exponents of each layer, and both windows</title>",
        f"<desc>{escape(describe(domains), quote=False)}</desc>",
        _DEFS,
        f'<rect x=".5" y=".5" width="{_WIDTH - 1}" height="{size - 1}" rx="6" fill="#FFFFFF" stroke="{_FAINT}"/>',
        _text(12, 22, "Exponents of each layer, and both windows", size=15, weight="bold"),
        _text(12, 40, "Darker: more of its scale domains reach so far down.", size=12),
        *chart,
        *filter(None, legend),
        "</svg>\n",
    ]
    return "\n".join(whole)


def _frame(unit: int, columns: int, bottom: int) -> Iterator[str]:
    """The chart's ground and its scale."""
    yield f'<rect x="{_LEFT}" y="{_TOP}" width="{unit * columns}" height="{bottom - _TOP}" fill="#F6F6F6"/>'
    for at in (0, 5, 10, *range(WINDOW + 3, columns, 5)):
        yield _text(_LEFT + unit * at + unit // 2, bottom + 14, str(at), anchor="middle")
    for at in (MARLIN_BINADES, WINDOW):
        yield _text(_LEFT + unit * at + unit // 2, bottom + 14, str(at), anchor="middle", weight="bold")
    yield _text(_LEFT, bottom + 29, "binades below the largest exponent of a scale domain", size=12)


def _lines(unit: int, bottom: int) -> Iterator[str]:
    """The ends of both windows."""
    marlin, disk = (_LEFT + unit * (at + 1) for at in (MARLIN_BINADES, WINDOW))
    for x, dashes in ((marlin, ' stroke-dasharray="4 3"'), (disk, "")):
        yield f'<path d="M{x} {_TOP - 14}V{bottom}" stroke="{_INK}" stroke-width="2"{dashes}/>'
    yield _text(marlin - 5, _TOP - 5, "Marlin ends", anchor="end", size=12)
    yield _text(disk + 5, _TOP - 5, "disk ends", size=12)


def _row(row: Layer, y: int, height: int, unit: int) -> Iterator[str]:
    """A layer: its exponents, from the largest down, and marks for what was not kept verbatim."""
    for first, last, share in shares(row, _WIDEST):
        for (colour, texture, _), low, high in (
            (_MARLIN, 0, MARLIN_BINADES),
            (_DISK, MARLIN_BINADES + 1, WINDOW),
            (_BEYOND, WINDOW + 1, _WIDEST),
        ):
            start, end = max(first, low), min(last, high)
            if start <= end:
                box = f'x="{_LEFT + unit * start}" y="{y}" width="{unit * (end - start + 1)}" height="{height - 1}"'
                yield f'<rect {box} fill="{colour}" fill-opacity="{0.3 + 0.7 * share:.2f}"/>'
                if texture:
                    yield f'<rect {box} fill="url(#{texture})"/>'
    if (mark := _mark(row)) is not None:
        yield _shape(mark, _RIGHT + 12, y + height / 2 - 0.5, min(height - 2, 9) / 2)


def _mark(row: Layer) -> bool | None:
    """Whether a layer holds rounded weights (True), or only shifted codes (False), or neither."""
    if all(domain.scaling.verbatim for domain in row.domains):
        return None
    return not all(domain.scaling.exact for domain in row.domains)


def _shape(rounded: bool, x: float, y: float, r: float) -> str:
    """A cross for rounded weights, a hollow triangle for shifted codes."""
    cross = f"M{x - r:g} {y - r:g}L{x + r:g} {y + r:g}M{x - r:g} {y + r:g}L{x + r:g} {y - r:g}"
    triangle = f"M{x - r:g} {y + r:g}H{x + r:g}L{x:g} {y - r:g}Z"
    colour, width = (_RED, 2.5) if rounded else (_INK, 1.5)
    return f'<path d="{cross if rounded else triangle}" stroke="{colour}" stroke-width="{width:g}" fill="none"/>'


def _labels(rows: Sequence[Layer], height: int) -> Iterator[str]:
    """The numbers of layers: as many as there is room for."""
    step = 1 if height >= 13 else 5 if height >= 9 else 10
    yield _text(_LEFT - 6, _TOP - 5, "layer", anchor="end", size=12)
    for i, row in enumerate(rows):
        if i % step == 0 and row.label:
            yield _text(_LEFT - 6, _TOP + i * height + height / 2 + 4, row.label, anchor="end")


def _legend(domains: Sequence[ScaleDomain], y: int) -> Iterator[str]:
    """What colours, textures and shapes mean; an empty text after each line."""
    for colour, texture, words in (_MARLIN, _DISK, _BEYOND):
        box = f'x="12" y="{y - 9}" width="22" height="11"'
        yield f'<rect {box} fill="{colour}"/>'
        if texture:
            yield f'<rect {box} fill="url(#{texture})"/>'
        yield _text(42, y, words, size=12)
        yield ""
        y += 17
    marks = {mark for domain in domains if (mark := _mark(Layer("", [domain]))) is not None}
    for mark, words in ((False, "some codes divided by a power of two: exact"), (True, "some weights rounded")):
        if mark in marks:
            yield _shape(mark, 23, y - 4, 4.5)
            yield _text(42, y, words, size=12)
            yield ""
            y += 17


def _text(x: float, y: float, words: str, *, size: int = 11, anchor: str = "", weight: str = "") -> str:
    more = "".join(f' {name}="{value}"' for name, value in (("text-anchor", anchor), ("font-weight", weight)) if value)
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{_INK}"{more}>{escape(words, quote=False)}</text>'
