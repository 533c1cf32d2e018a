"""The record of a run: one JSON object a line, cut at the resumed step, readable after a kill."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from disks import fill, small_disk

from kdfuse.engine.run import log
from kdfuse.engine.run.log import RunLog

CLOCK = ("time", "images_per_s", "data_wait")


def train(
    run_dir: Path, first: int, last: int, resume: int | None = None, end: bool = True
) -> None:
    """Steps first..last of a run of 2 epochs with 4 steps each, logged every second step."""
    with RunLog(run_dir, 8, 2, resume_step=resume, facts={"images": 64}) as run:
        run.note("loader: torchvision")
        for step in range(first, last + 1):
            if step % 2 == 0:
                run.step(step, step / 4, {"loss": 1 / step}, 100.0 * step, 0.25)
            if step % 4 == 0:
                run.epoch(step // 4, {"top1": 50.0 + step, "train_loss": 1.0, "lr": 0.1})
        if end:
            run.end({"best_top1": 58.0})


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


def test_records(tmp_path: Path) -> None:
    train(tmp_path, 1, 8)
    records = log.read(tmp_path / "log.jsonl")
    assert [(r["kind"], r["step"], r["epoch"]) for r in records] == [
        ("start", 0, 0.0), ("note", 0, 0.0), ("step", 2, 0.5), ("step", 4, 1.0),
        ("epoch", 4, 1.0), ("step", 6, 1.5), ("step", 8, 2.0), ("epoch", 8, 2.0),
        ("end", 8, 2.0),
    ]  # fmt: skip
    assert records[0]["images"] == 64 and records[0]["steps"] == 8
    assert records[2]["loss"] == 0.5 and records[2]["images_per_s"] == 200.0
    assert records[4]["top1"] == 54.0
    assert all(record["time"] > 1.6e9 for record in records)


@pytest.mark.parametrize("resume", [0, 2, 3, 4, 5, 7])
def test_killed_and_resumed_twin_is_the_same(resume: int, tmp_path: Path) -> None:
    whole, twin = tmp_path / "whole", tmp_path / "twin"
    whole.mkdir()
    twin.mkdir()
    train(whole, 1, 8)
    train(twin, 1, 7, end=False)
    with (twin / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "ste')  # the kill came in the middle of a line
    train(twin, resume + 1, 8, resume=resume)
    expected = without_clock(log.read(whole / "log.jsonl"))
    assert without_clock(log.read(twin / "log.jsonl")) == expected


def test_resume_of_a_finished_run_drops_its_end(tmp_path: Path) -> None:
    train(tmp_path, 1, 8)
    train(tmp_path, 9, 8, resume=8, end=False)
    assert [r["kind"] for r in log.read(tmp_path / "log.jsonl")].count("end") == 0


def test_a_new_log_never_overwrites(tmp_path: Path) -> None:
    train(tmp_path, 1, 2)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="resume"):
        RunLog(tmp_path, 8, 2)
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_no_nan_reaches_the_file(tmp_path: Path) -> None:
    with RunLog(tmp_path, 8, 2) as run:
        run.step(1, 0.25, {"loss": math.nan, "kd": -math.inf, "ce": 1.0}, 1.0, 0.0)
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    record = json.loads(text.splitlines()[-1])
    assert (record["loss"], record["kd"], record["ce"]) == (None, None, 1.0)


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, 8, 2) as run:
        run.step(2, 0.5, {"loss": 1.0}, 1.0, 0.0)
        assert [r["kind"] for r in log.read(run.path)] == ["start", "step"]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 8, 2, rank=1) as run:
        run.note("hello")
        run.step(2, 0.5, {"loss": 1.0}, 1.0, 0.0)
        run.epoch(1, {"top1": 1.0})
        run.end({})
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_line_an_epoch_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, 1, 8)
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first == "loader: torchvision"
    words = r"loss 1  top1 54  img/s 267  wait 25%  ETA \d:\d\d  lr 0\.1"  # of 200 and 400
    assert re.fullmatch(f"epoch 1/2  {words}", second)
    assert third.startswith("epoch 2/2  loss 1  top1 58  img/s 686  wait 25%  ETA 0:00")
    assert last == "finished  best_top1 58"


def test_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    record = '{"kind": "start", "step": 0, "epoch": 0.0}\n'
    path.write_text(f"{record}nonsense\n{record}")
    with pytest.raises(ValueError, match=r"log\.jsonl line 2"):
        log.read(path)


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, 1, 8)
    board = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("epoch/top1")] == [(4, 54.0), (8, 58.0)]
    assert [e.step for e in board.Scalars("step/loss")] == [2, 4, 6, 8]


def test_on_a_full_disk_a_log_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is full after the first record, has room for half of one later, and then for all."""
    many = {f"slt{i}_loss": float(i) for i in range(400)}

    def records(run: RunLog, steps: range) -> None:
        for step in steps:
            run.step(step, step / 4, many, 1.0, 0.0)

    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with RunLog(disk, 8, 2) as run:
            filler = fill(disk)
            records(run, range(1, 4))
            run.note("told while it is full")
            os.truncate(filler, filler.stat().st_size - 8192)
            records(run, range(4, 6))
            assert shutil.disk_usage(disk).free == 0
            filler.unlink()
            records(run, range(6, 9))
            run.end({})
        kinds = ["start", *["step"] * 3, "note", *["step"] * 5, "end"]
        found = log.read(disk / "log.jsonl")
        assert [record["kind"] for record in found] == kinds
        assert all(record[name] == many[name] for record in found[1:4] for name in many)
        told = capsys.readouterr().out
        for name in ("log.jsonl", "tfevents"):
            lines = [line for line in told.splitlines() if "cannot write" in line and name in line]
            assert len(lines) == 1 and lines[0].endswith(log.LATER)
        reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        board = reading.EventAccumulator(str(disk / "tensorboard"))
        board.Reload()
        assert [e.step for e in board.Scalars("step/slt7_loss")] == list(range(1, 9))


def test_on_a_full_disk_a_run_neither_begins_nor_ends(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        filler = fill(disk)
        with pytest.raises(OSError, match=r"No space left on device: .*log\.jsonl"):
            RunLog(disk, 8, 2)
        filler.unlink()
        with RunLog(disk, 8, 2, resume_step=0) as run:
            fill(disk)
            with pytest.raises(OSError, match=r"No space left on device: .*log\.jsonl"):
                run.end({f"slt{i}_top1": 1.0 for i in range(400)})
        assert [r["kind"] for r in log.read(disk / "log.jsonl")] == ["start"]
        with pytest.raises(OSError, match=r"No space left on device: .*log\.jsonl"):
            RunLog(disk, 8, 2, resume_step=0)
        assert [r["kind"] for r in log.read(disk / "log.jsonl")] == ["start"]


def test_a_run_needs_no_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("")
    train(tmp_path, 1, 8)
    told = [line for line in capsys.readouterr().out.splitlines() if "cannot write" in line]
    assert len(told) == 1 and "tensorboard: File exists; the run goes on without it" in told[0]
    assert log.read(tmp_path / "log.jsonl")[-1]["kind"] == "end"


def test_what_is_printed_may_go_to_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115  # what it still holds, it cannot write either
    monkeypatch.setattr(sys, "stdout", full)
    train(tmp_path, 1, 8)
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):
        full.close()
    assert log.read(tmp_path / "log.jsonl")[-1]["kind"] == "end"
