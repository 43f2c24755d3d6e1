"""The study's page in headless Chromium: it is drawn, and nothing sticks out of it."""

from pathlib import Path

import pytest

from browser import CHROMIUM, count, screenshot

PAGE = Path(__file__).parents[2] / "docs" / "study" / "index.html"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium"),
]


def test_the_pictures_are_drawn_and_fit(tmp_path):
    pixels = screenshot(PAGE.as_uri(), tmp_path, 1100, 9000)
    assert pixels.shape == (9000, 1100, 3)
    # The fields and marks of the four pictures; a file that was not found would leave them out.
    assert count(pixels, "1a8a5a") > 20_000  # codes kept
    assert count(pixels, "8fd0ae") > 3_000  # codes shifted
    assert count(pixels, "dbe9f4") > 3_000  # where m may land
    assert count(pixels, "e6f3ec") > 20_000  # exact
    for color in ("2f6fae", "c8643c", "d9a441"):
        assert count(pixels, color) > 300, color
    assert (pixels[:, -8:] == 255).all(), "something reaches the right edge"


def test_a_narrow_window_works_too(tmp_path):
    pixels = screenshot(PAGE.as_uri(), tmp_path, 500, 6000)
    assert (pixels[:, -4:] == 255).all(), "something reaches the right edge"
    assert (pixels < 128).any(axis=(1, 2)).mean() > 0.3, "the page is mostly empty"
