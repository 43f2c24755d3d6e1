"""The study's page in headless Chromium: it is drawn, and nothing sticks out of it."""

from pathlib import Path

import pytest

from browser import CHROMIUM, count, screenshot

PAGE = Path(__file__).parents[2] / "docs" / "study" / "index.html"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium"),
]


# The fields and marks of the four pictures, and how many pixels of each there are at least; a picture that was not
# drawn would leave them out.
BRIGHT = {
    "1a8a5a": 15_000, "8fd0ae": 1_500, "dbe9f4": 1_500, "e6f3ec": 15_000, "2f6fae": 300, "c8643c": 300, "d9a441": 300,
}  # fmt: skip
DARK = {
    "35b57d": 15_000, "2c6a4b": 1_500, "22384c": 1_500, "1b3329": 15_000, "4f94d8": 300, "dd7a52": 300, "d9a441": 300,
}  # fmt: skip


def unfolded(tmp_path):
    """The page as it is once a reader has opened all that is folded."""
    page = tmp_path / "unfolded.html"
    page.write_text(PAGE.read_text().replace("<details>", "<details open>"))
    return page


@pytest.mark.parametrize(("width", "height"), [(390, 9000), (1280, 6000)])
@pytest.mark.parametrize(("colors", "paper"), [(BRIGHT, "ffffff"), (DARK, "15181b")], ids=["bright", "dark"])
def test_the_pictures_are_drawn_and_fit(tmp_path, width, height, colors, paper):
    pixels = screenshot(PAGE.as_uri(), tmp_path, width, height, dark=paper != "ffffff")
    assert pixels.shape == (height, width, 3)
    for color, least in colors.items():
        assert count(pixels, color) > least, color
    assert count(pixels[:, -8:], paper) == 8 * height, "something reaches the right edge"
    others = (BRIGHT, DARK)[colors is BRIGHT]
    for color in {*list(others)[:2], "000000"}:
        assert count(pixels, color) < 50, f"{color} is for other pages"
    # A telephone shows the same as a desk, in a column: nothing is scaled down to be read.
    assert (pixels != pixels[0, 0]).any(axis=(1, 2)).mean() > 0.3, "the page is mostly empty"


def test_what_is_folded_fits_too(tmp_path):
    pixels = screenshot(unfolded(tmp_path).as_uri(), tmp_path, 390, 16000)
    assert count(pixels[:, -8:], "ffffff") == 8 * 16000, "something reaches the right edge"
    folded = screenshot(PAGE.as_uri(), tmp_path, 390, 16000)
    assert (pixels < 128).any(axis=(1, 2)).sum() > (folded < 128).any(axis=(1, 2)).sum() + 2000
