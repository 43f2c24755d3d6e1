"""Pages in headless Chromium, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def screenshot(page: str, directory: Path, width: int, height: int, dark: bool = False) -> np.ndarray:
    """The first pixels of the page at a URI, uint8 [height, width, 3], for a reader who prefers it bright or dark."""
    image = pytest.importorskip("matplotlib.image")
    out = directory / "page.png"
    command = [
        CHROMIUM, *FLAGS, f"--user-data-dir={directory / 'profile'}", f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={out}", page,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return np.round(image.imread(out)[:, :, :3] * 255).astype(np.uint8)


def count(pixels: np.ndarray, color: str) -> int:
    """How many pixels have a colour, "1a8a5a"."""
    red, green, blue = (int(part, 16) for part in re.findall("..", color))
    return int(((pixels[..., 0] == red) & (pixels[..., 1] == green) & (pixels[..., 2] == blue)).sum())
