"""The gradients under stored teachers: what is measured, and the table of what was."""

import json
from pathlib import Path

import pytest
import torch

from kdfuse.kernels.bench import teachers
from kdfuse.kernels.bench.report import each

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"
RECORDED = [r for _, r in each([RESULTS / "cpu/sampled_teachers.jsonl"]) if r["kind"] == "teacher"]


def test_bits_of_a_row():
    top = teachers.top("", 10, "drop").bits(1000, 0)
    assert top == 10 * (10 + 16)
    assert teachers.top("", 10, "spread").bits(1000, 0) == top + 32
    assert teachers.drawn(50, 0).bits(1000, 12) == 8 * 24
    assert teachers.drawn(40, 10).bits(21841, 20) == 10 * (15 + 16) + 20 * (15 + 6)


def test_a_run_says_what_it_prints(tmp_path, capsys):
    out = tmp_path / "teachers.jsonl"
    teachers.main(["--classes", "60", "70", "--rows", "3", "--views", "4", "--out", str(out)])
    printed = capsys.readouterr().out
    facts, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert facts["kind"] == "facts" and facts["rows"] == 3
    assert len(records) == 2 * 2 * len(teachers.FORMS)
    teachers.main(["--from", str(out)])
    assert capsys.readouterr().out == printed
    for r in records:
        assert r["views"] == (4 if "draws" in r["form"] else 1)
        assert 0 < r["angle_of_mean"] <= r["angle"] * (1 + 1e-9) and r["bytes"] > 0


def test_angles():
    g = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert teachers.angle(g, torch.tensor([[0.0, 2.0], [3.0, 3.0]])) == pytest.approx(45.0)


def test_the_page_shows_the_records():
    assert teachers.table(RECORDED) in (RESULTS / "README.md").read_text()
    keys = {(r["form"], r["classes"], r["shape"]) for r in RECORDED}
    forms = [form.name for form in teachers.FORMS]
    assert keys == {(f, c, s) for f in forms for c in teachers.CLASSES for s in teachers.SHAPES}
    assert len(RECORDED) == len(keys)


def test_what_was_recorded_keeps_the_laws():
    for r in RECORDED:
        if r["views"] == 1:
            assert r["angle_of_mean"] == r["angle"]
            continue
        assert r["of_independent"] < 1.02
        assert r["angle_of_mean"] < r["angle"] / 3  # 50 views: about a seventh, where it is small
