"""Pictures as Chromium shows them: on a desk and on a phone, in light and in dark."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pictured import answers, run_of
from PIL import Image

from kdfuse.engine.report.drawing import COLOURS
from kdfuse.engine.report.page import report
from kdfuse.engine.report.pictures import PICTURES, make

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
).split()
SCHEMES = {"dark": 0, "light": 1}  # as blink counts them

pytestmark = [
    pytest.mark.slow(30),
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM} to look with"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A run of 40 classes whose names are long, with every picture."""
    run = run_of(tmp_path_factory.mktemp("runs") / "shown")
    make(run, answers(40, 200, "class {} of a set with long names"), tuple(PICTURES))
    return report([run], run / "report.html")


def look(page: Path, scheme: str, *words: str) -> str:
    """Open a page as somebody with this scheme would; what Chromium prints."""
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={page.parent / 'browser'}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            *words,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(("width", "height"), [(1280, 6400), (390, 11000)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pictures_are_drawn_on_the_pages_ground(scheme, width, height, page: Path, tmp_path: Path):
    out = tmp_path / "seen.png"
    look(page, scheme, f"--screenshot={out}", f"--window-size={width},{height}")
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert pixels.shape == (height, width, 3)
    named = dict(re.findall(r"--(\w+): #(\w{6})", COLOURS.split("@media")[scheme == "dark"]))

    def share(colour: str, part: np.ndarray) -> float:
        rgb = [int(named[colour][i : i + 2], 16) for i in (0, 2, 4)]
        return float((np.abs(part - rgb).max(-1) <= 2).mean())

    assert share("page", pixels[:20]) == 1
    assert share("card", pixels[1500:4000]) > 0.3
    assert share("k0", pixels) > 1e-4 and share("k1", pixels) > 1e-4
    assert share("ink", pixels) > 1e-4  # words


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_makes_the_page_wider_than_its_window(width: int, page: Path, tmp_path: Path):
    """Chromium writes the width of an inner window's contents into the page that holds it."""
    (tmp_path / "inner.html").write_text(
        page.read_text()
        + "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    )
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<body><p></p><script>onmessage = e => document.querySelector('p').textContent = "
        f"'wide ' + e.data</script><iframe src='inner.html' width={width} height=800></iframe>"
    )
    found = re.search(r"wide (\d+)", look(outer, "light", "--dump-dom"))
    assert found is not None and int(found[1]) <= width
