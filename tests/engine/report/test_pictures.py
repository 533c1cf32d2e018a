"""The pictures of a run: their files, what a page shows of them, and their colours."""

import base64
import io
import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from pictured import answers, run_of
from PIL import Image

from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.report.drawing import COLOURS, KINDS
from kdfuse.engine.report.page import LIMIT, report
from kdfuse.engine.report.pictures import FOLDER, PICTURES, chosen, make

pytestmark = pytest.mark.slow(10)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    run = run_of(tmp_path_factory.mktemp("runs") / "drawn")
    make(run, answers(10, 60), tuple(PICTURES))
    return run


def test_words_for_pictures():
    assert chosen("all") == tuple(PICTURES) and chosen("none") == ()
    assert chosen("confusion, tsne") == ("tsne", "confusion")
    with pytest.raises(ValueError, match=r"no picture 'confussion'; did you mean confusion\?"):
        chosen("tsne,confussion")
    with pytest.raises(ValueError, match=f"some of: {','.join(PICTURES)}"):
        chosen("")


def test_each_picture_is_a_file_with_its_numbers(drawn: Path):
    names = {path.name for path in (drawn / FOLDER).iterdir()}
    assert names == {f"{name}.{end}" for name in PICTURES for end in ("svg", "json")}
    for name in PICTURES:
        held = json.loads((drawn / FOLDER / f"{name}.json").read_text())
        assert held["about"]["step"] == 10 and held["numbers"]
        svg = (drawn / FOLDER / f"{name}.svg").read_text()
        assert ET.fromstring(svg).get("viewBox") and "prefers-color-scheme" in svg
        assert "<script" not in svg and not re.search(r'href="(?!data:image/)', svg)


def test_page_shows_what_was_drawn_and_needs_nothing_else(drawn: Path, tmp_path: Path):
    page = report([drawn], tmp_path / "page.html").read_text()
    for picture in PICTURES.values():
        assert f"<h3>{picture.title}</h3>".replace("'", "&#39;") in page
    assert not re.search(r'(src|href)="(?!#|data:image/)', page)
    assert "<script" not in page and "@import" not in page
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    for svg in re.findall(r'<svg [^>]*class="panel".*?</svg>', page, flags=re.DOTALL):
        ET.fromstring(svg)
    assert "class &lt;1&gt;" in page and "<1>" not in page
    assert "The best checkpoint, of step 10, computed on cpu." in page
    again = report([drawn], tmp_path / "again.html").read_text()
    assert again == page


def test_page_shows_the_pictures_that_it_is_asked_for(drawn: Path, tmp_path: Path):
    def titles(shows):
        page = report([drawn], tmp_path / "page.html", shows).read_text()
        return [name for name, one in PICTURES.items() if f"<h3>{one.title}</h3>" in page]

    assert titles(()) == []
    assert titles(("calibration",)) == ["calibration"]


def test_a_run_that_has_gone_on_says_so(drawn: Path, tmp_path: Path):
    run = run_of(tmp_path / "longer")
    given = answers(10, 60, about={"checkpoint": "best", "step": 5, "device": "cpu"})
    make(run, given, ["agreement"])
    page = report([run], tmp_path / "page.html").read_text()
    assert "of step 5, computed on cpu; the run has gone on since." in page


def test_without_a_teacher_the_page_says_why(tmp_path: Path):
    run = run_of(tmp_path / "alone")
    make(run, answers(10, 60), ["classes"])
    given = answers(10, 60, no_teacher="its answers were <recorded>")
    del given.networks["teacher"]
    make(run, given, ["classes", "agreement", "correlation", "calibration"])
    assert not (run / FOLDER / "classes.svg").exists()  # of the teacher that was there
    page = report([run], tmp_path / "page.html").read_text()
    assert page.count("Left out, for it needs the teacher: its answers were &lt;recorded&gt;") == 1
    assert "Agreement with the teacher" in page and "<h3>Calibration</h3>" in page


def test_a_detector_has_no_pictures_and_the_page_says_so(tmp_path: Path):
    run = tmp_path / "detector"
    run.mkdir()
    (run / "recipe.yaml").write_text(Recipe.load("coco/nkd:resnet101-resnet50").explain())
    words = "Pictures are of classifiers alone."
    assert words in report([run], tmp_path / "page.html", ("tsne",)).read_text()
    assert words not in report([run], tmp_path / "page.html").read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"numbers": {}, "about": {}}', "\xff"])
def test_a_damaged_picture_does_not_keep_the_page(text, tmp_path: Path):
    run = run_of(tmp_path / "damaged")
    (run / FOLDER).mkdir()
    (run / FOLDER / "tsne.json").write_text(text, encoding="latin-1")
    page = report([run], tmp_path / "page.html").read_text()
    assert "tsne.json is damaged" in page and "draw it again with --pictures tsne" in page


def test_a_thousand_classes_stay_small(tmp_path: Path):
    run = run_of(tmp_path / "large")
    names = [name for name in PICTURES if name != "tsne"]
    make(run, answers(1000, 1000, "n{:08d} a name that is long"), names)
    for name in names:
        assert (run / FOLDER / f"{name}.svg").stat().st_size < 150_000, name
    matrix = (run / FOLDER / "confusion.svg").read_text()
    assert matrix.count("<rect") <= 30 * 30 + 2 and "Of 1000 classes the 30 with" in matrix
    held = json.loads((run / FOLDER / "correlation.json").read_text())["numbers"]
    assert np.shape(held["blocks"]) == (100, 100) and "student" not in held


def test_a_page_of_many_runs_stays_below_its_limit(drawn: Path, tmp_path: Path):
    own = tmp_path / "heavy"
    runs = []
    for number in range(4):
        run = run_of(tmp_path / f"run{number}")
        given = answers(10, 60)
        noise = Image.effect_noise((1200, 1200), 90).convert("RGB")
        make(run, given, ["confusion"])
        file = run / FOLDER / "confusion.json"
        held = json.loads(file.read_text())
        noise.save(data := io.BytesIO(), "JPEG", quality=95)
        held["numbers"]["pairs"][0]["pictures"] = [base64.b64encode(data.getvalue()).decode()] * 2
        file.write_text(json.dumps(held))
        runs.append(run)
    size = len(held["numbers"]["pairs"][0]["pictures"][0]) * 2
    fit = (LIMIT - 300_000) // size
    assert 0 < fit < 4
    page = report(runs, own.with_suffix(".html"))
    text = page.read_text()
    assert page.stat().st_size < LIMIT
    assert text.count("<h3>Confusion matrix of the student</h3>") == fit
    assert text.count("No room on this page: see") == 4 - fit


# Colours


def linear(colour: str) -> np.ndarray:
    """sRGB to linear light."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """Linear light to CIELAB (D65)."""
    to = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to) @ np.clip(light, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


SEEN = {  # Machado, Oliveira and Fernandes (2009), severity 1
    "by all": np.eye(3),
    "without red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "without green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "without blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(scheme):
    part = COLOURS.split("@media")[scheme == "dark"]
    named = dict(re.findall(r"--(\w+): (#\w{6})", part))
    kinds = [named[f"k{i}"] for i in range(KINDS)]

    def luminance(colour: str) -> float:
        return float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05

    for colour in kinds:  # WCAG 2.1, 1.4.11: graphics want 3
        both = sorted([luminance(colour), luminance(named["card"])])
        assert both[1] / both[0] >= 3, colour
    for seen, matrix in SEEN.items():
        shown = [lab(np.array(matrix) @ linear(colour)) for colour in kinds]
        apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(shown, 2)]
        assert min(apart) > 15, seen
