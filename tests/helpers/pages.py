"""Reading and opening the pages that the study writes."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")


class PageReader(HTMLParser):
    """Collects the text, the charts and every attribute of a page."""

    def __init__(self):
        super().__init__()
        self.charts, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "svg":
            self.charts.append(dict(attrs))

    def handle_data(self, data):
        if data.strip():
            self.text.append(data.strip())


def read_page(path: Path) -> PageReader:
    reader = PageReader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def assert_loads_nothing(path: Path) -> None:
    """No address, no script, no style sheet and no frame from elsewhere."""
    reader = read_page(path)
    for tag, name, value in reader.attributes:
        if not name.startswith("xmlns"):
            assert not re.search(r"https?:|^//", value), (tag, name, value)
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert not any(tag in ("script", "link", "iframe") for tag, _, _ in reader.attributes)
    without_namespaces = re.sub(r'xmlns[:\w]*="[^"]*"', "", path.read_text(encoding="utf-8"))
    assert not re.search(r"https?://|@import|<script", without_namespaces)


def photograph(page: Path, folder: Path, width: int, height: int = 2000) -> np.ndarray:
    """Open a page in headless Chromium, check its console and that it fits, and return its pixels."""
    picture = folder / "page.png"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    flags += " --disable-background-networking --disable-component-update --disable-sync --enable-logging=stderr"
    options = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    command = ["chromium", *flags.split(), *options, f"--screenshot={picture}", page.as_uri()]
    told = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stderr
    assert "CONSOLE" not in told, [line for line in told.splitlines() if "CONSOLE" in line]
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == width
    assert (np.abs(pixels[:, -5:] - pixels[0, 0]) < 0.02).all(), "the page is wider than the window"
    return pixels
