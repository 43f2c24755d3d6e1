"""The study's page in headless Chromium: it is drawn, and nothing sticks out of it."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "study" / "index.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium"),
]


def screenshot(directory: Path, width: int, height: int) -> np.ndarray:
    """The page's first pixels, uint8 [height, width, 3]."""
    image = pytest.importorskip("matplotlib.image")
    out = directory / "page.png"
    command = [
        CHROMIUM, *FLAGS, f"--user-data-dir={directory / 'profile'}", f"--window-size={width},{height}",
        f"--screenshot={out}", PAGE.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return np.round(image.imread(out)[:, :, :3] * 255).astype(np.uint8)


def count(pixels: np.ndarray, color: str) -> int:
    return int((pixels == [int(part, 16) for part in re.findall("..", color)]).all(axis=-1).sum())


def test_the_pictures_are_drawn_and_fit(tmp_path):
    pixels = screenshot(tmp_path, 1100, 9000)
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
    pixels = screenshot(tmp_path, 500, 6000)
    assert (pixels[:, -4:] == 255).all(), "something reaches the right edge"
    assert (pixels < 128).any(axis=(1, 2)).mean() > 0.3, "the page is mostly empty"
