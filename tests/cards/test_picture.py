"""The picture: one row a layer, every exponent where it belongs, legible, and well-formed whatever it is drawn from."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from browser import CHROMIUM, count, screenshot
from fp4cast.cards.picture import describe, draw
from fp4cast.cards.subject import layers, shares
from fp4cast.casting.tight_rule import Scaling

SVG = "{http://www.w3.org/2000/svg}"
MARLIN, DISK, BEYOND = "#0072B2", "#E69F00", "#D55E00"


def domain(module, spread, *, exact=True, verbatim=True, top=0):
    """A scale domain as a conversion has them; a spread of None is one that holds only zeros."""
    low, high = (None, None) if spread is None else (top - spread, top)
    scaling = Scaling(2.0 ** (top - 8), top - 8, low, high, top - 8, top - 8 if exact else top - 9, verbatim)
    return SimpleNamespace(pairs=(SimpleNamespace(module=module),), scaling=scaling)


def boxes(svg):
    """(colour, x, y, width, opacity) of every cell of the chart."""
    found = ET.fromstring(svg).iter(f"{SVG}rect")  # noqa: S314, our own
    return [
        (r.get("fill"), int(r.get("x")), int(r.get("y")), int(r.get("width")), float(r.get("fill-opacity")))
        for r in found
        if r.get("fill-opacity")
    ]


def columns(svg):
    """(row, colour) -> binades that are drawn, of a picture whose columns are 16 pixels wide."""
    drawn = {}
    tops = sorted({y for _, _, y, _, _ in boxes(svg)})
    for colour, x, y, width, _ in boxes(svg):
        drawn.setdefault((tops.index(y), colour), set()).update(range((x - 42) // 16, (x - 42 + width) // 16))
    return drawn


def test_each_exponent_stands_in_its_window():
    svg = draw([domain(f"model.layers.{i}.x", spread) for i, spread in enumerate((0, 14, 15, 17, 18))])
    assert columns(svg) == {
        (0, MARLIN): {0},
        (1, MARLIN): set(range(15)),
        (2, MARLIN): set(range(15)), (2, DISK): {15},
        (3, MARLIN): set(range(15)), (3, DISK): {15, 16, 17},
        (4, MARLIN): set(range(15)), (4, DISK): {15, 16, 17}, (4, BEYOND): {18},
    }  # fmt: skip


def test_darker_means_that_more_domains_reach_so_far():
    some = [domain("layers.0.w1", 2), domain("layers.0.w2", 4), domain("layers.0.w3", 4), domain("layers.0.w4", None)]
    (layer,) = layers(some, 9)
    assert list(shares(layer, 39)) == [(0, 2, 0.75), (3, 4, 0.5)]
    assert [opacity for *_, opacity in boxes(draw(some))] == [
        pytest.approx(0.3 + 0.7 * s, abs=0.006) for s in (0.75, 0.5)
    ]


def test_a_row_for_each_layer_in_their_order():
    names = ["lm_head", "model.layers.10.x", "model.layers.2.x", "model.layers.2.y.7", "mtp.0.x"]
    rows = layers([domain(name, 1) for name in names], 128)
    assert [(row.label, len(row.domains)) for row in rows] == [("", 1), ("2", 2), ("10", 1), ("0", 1)]
    joined = layers([domain(f"layers.{i}.x", 1) for i in range(10)], 4)
    assert [row.label for row in joined] == ["0-2", "3-5", "6-8", "9"]


@pytest.mark.parametrize(("count", "labels"), [(36, 36), (61, 13), (92, 10)])
def test_numbers_of_layers_do_not_touch(count, labels):
    texts = [
        (float(t.get("y")), int(t.get("font-size")))
        for t in ET.fromstring(draw([domain(f"layers.{i}.x", 9) for i in range(count)])).iter(f"{SVG}text")  # noqa: S314
        if t.get("text-anchor") == "end" and t.text.isdigit()
    ]
    assert len(texts) == labels
    assert all(below - above >= size for (above, size), (below, _) in pairwise(texts))


def test_shapes_and_textures_say_what_colours_say():
    shifted = domain("layers.0.x", 18, verbatim=False)
    rounded = domain("layers.1.x", 20, exact=False, verbatim=False)
    quiet, loud = draw([domain("layers.0.x", 9)]), draw([shifted, rounded])
    assert not re.search("divided|rounded", quiet)
    assert "some codes divided by a power of two: exact" in loud and "some weights rounded" in loud
    for texture in ("one", "two"):
        assert f'fill="url(#{texture})"' in loud and f'<pattern id="{texture}"' in loud
    assert describe([shifted, rounded]).endswith("0 fit the window of 17 on disk, 0 that of 14 in Marlin.")


def luminance(colour):
    """The relative luminance of WCAG 2."""
    parts = [int(part, 16) / 255 for part in re.findall(r"\w\w", colour)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_it_is_legible_at_400_pixels_on_any_page():
    root = ET.fromstring(draw([domain("layers.0.x", 20, exact=False, verbatim=False)]))  # noqa: S314
    assert root.get("viewBox").startswith("0 0 400 ")
    ground = root.find(f"{SVG}rect")
    assert (ground.get("width"), ground.get("fill")) == ("399", "#FFFFFF")
    for text in root.iter(f"{SVG}text"):
        assert int(text.get("font-size")) >= 11
        assert 1.05 / (luminance(text.get("fill")) + 0.05) >= 7  # contrast with white, WCAG 2's AAA
    left, right, _ = sorted(luminance(each) for each in (MARLIN, BEYOND, DISK))
    assert (right + 0.05) / (left + 0.05) > 1.3


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium")
@pytest.mark.parametrize("page", ["FFFFFF", "0B0F19"])
def test_a_browser_draws_it(tmp_path, page):
    spreads = [10, 14, 16, 17, 20]
    some = [domain(f"layers.{i}.x", spreads[i % 5], verbatim=spreads[i % 5] <= 17) for i in range(40)]
    (tmp_path / "x.svg").write_text(draw(some))
    (tmp_path / "x.html").write_text(f'<body style="margin:0;background:#{page}"><img width="400" src="x.svg"></body>')
    pixels = screenshot((tmp_path / "x.html").as_uri(), tmp_path, 500, 700)
    assert (pixels[:, 402:] == [int(part, 16) for part in re.findall("..", page)]).all()
    assert count(pixels[:, :400], "FFFFFF") > 80_000
    for colour, cells in ((MARLIN, 40 * 11), (DISK, 3 * 16), (BEYOND, 3 * 8)):
        assert count(pixels, colour.removeprefix("#").lower()) > cells * 16 * 8 / 3, colour  # textures cover a part
    assert count(pixels[:, :36], "222222") > 40, "no numbers of layers"


MODULES = st.lists(
    st.sampled_from(["layers", "0", "7", "123456", "1234567", "x", "<b>&'\"", "", "٣", "\n"]), max_size=5
)
DOMAINS = st.builds(
    lambda parts, *rest: domain(".".join(parts), rest[0], exact=rest[1], verbatim=rest[2], top=rest[3]),
    MODULES, st.none() | st.integers(0, 253), st.booleans(), st.booleans(), st.integers(-127, 127),
)  # fmt: skip


@given(st.lists(DOMAINS, min_size=1, max_size=300))
def test_whatever_the_domains_it_is_well_formed_and_inside(domains):
    svg = draw(domains)
    assert svg == draw(domains)
    root = ET.fromstring(svg)  # noqa: S314
    _, _, width, height = map(int, root.get("viewBox").split())
    assert height < 1500
    for box in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width and y + h <= height
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.get("y")) < height
    assert {each.tag.removeprefix(SVG) for each in root.iter()} <= {
        "svg", "title", "desc", "defs", "pattern", "path", "rect", "text"
    }  # fmt: skip
    assert not re.search(r"href|http(?!://www\.w3\.org/2000/svg)|style|<b>", svg)
