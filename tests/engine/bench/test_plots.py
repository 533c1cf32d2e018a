"""Records as bars: every number that was measured is drawn, with its case and side."""

import re
from pathlib import Path

import pytest

from kdfuse.engine.bench.data.table import panels as of_data
from kdfuse.engine.bench.e2e.table import panels as of_e2e
from kdfuse.engine.bench.plots import Panel, plot, rounded
from kdfuse.engine.bench.records import read
from kdfuse.engine.bench.step.table import panels as of_step

RECORDED = Path(__file__).parents[3] / "docs/results/cpu"


def texts(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_cases_sides_and_numbers_are_drawn(tmp_path):
    panel = Panel("one of two", ["kd", "slkd2"], {"kdfuse": [123.0, 45.0], "plain": [67.0, None]})
    plot([panel, Panel("two", ["dali"], {"images/s": [8.5]})], tmp_path / "bars.svg")
    found = texts(tmp_path / "bars.svg")
    for text in ("one of two", "two", "kd", "slkd2", "dali", "kdfuse", "plain", "123", "67", "8.5"):
        assert text in found
    assert found.count("kdfuse") == 1  # a legend, where there is something to tell apart


@pytest.mark.parametrize(
    "verb, kind, panels, count",
    [("step", "step", of_step, 1), ("e2e", "e2e", of_e2e, 2), ("data", "loader", of_data, 2)],
)
def test_the_recorded_benchmarks_can_be_drawn(verb, kind, panels, count, tmp_path):
    records = read([RECORDED / f"{verb}.jsonl"], kind, verb)
    made = panels(records)
    assert len(made) == count
    assert sum(len(panel.cases) for panel in made) == sum(r["kind"] == kind for r in records)
    plot(made, tmp_path / "bars.svg")
    found = texts(tmp_path / "bars.svg")
    for record in records:
        if record["kind"] == kind:
            assert rounded(record["images_per_s"]) in found


@pytest.mark.parametrize("verb", ["step", "e2e", "data"])
def test_a_picture_goes_with_recorded_files(verb, kd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded = RECORDED / f"{verb}.jsonl"
    assert kd("bench", verb, "--from", recorded, "--plot", "bars.png").code == 0
    assert Path("bars.png").read_bytes().startswith(b"\x89PNG")
    code, _, told = kd("bench", verb, "--from", recorded, "--plot", "bars.pdf")
    assert code == 2 and "--plot: got bars.pdf, wants a name that ends in .svg or .png" in told
    code, _, told = kd("bench", verb, "--from", recorded, "--plot", "nowhere/bars.svg")
    assert code == 2 and "--plot nowhere/bars.svg: its folder is not there" in told
