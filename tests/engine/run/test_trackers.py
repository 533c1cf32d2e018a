"""Trackers beside a log: which are opened, what they hold, and what a run does without them.

Weights & Biases works offline here, MLflow with a database in the test's folder.
"""

import json
import math
import os
import struct
import threading
import time
from pathlib import Path

import pytest
from tiny import tiny

from kdfuse.engine.run import trackers
from kdfuse.engine.run.log import RunLog, read
from kdfuse.engine.run.trackers import remote
from kdfuse.engine.run.trackers.remote import Remote, TrackerError
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(8)


def recipe_of(*names):
    return tiny(Path("digits"), run={"trackers": names})


def steps(folder, recipe, numbers, resume=None, end=False):
    with RunLog(folder, 8, 2, resume_step=resume, recipe=recipe) as log:
        for step in numbers:
            log.step(step, step / 4, {"loss": 1.0 / step}, 100.0, 0.0)
        log.epoch(1, {"top1": 50.0, "kl_teacher_to_slt0": math.nan})
        if end:
            log.end({})


@pytest.mark.parametrize(
    ("names", "there"), [(None, True), (("tensorboard",), True), ((), False)], ids=str
)
def test_tensorboard_is_there_unless_it_is_left_out(names, there, tmp_path):
    pytest.importorskip("tensorboard")
    recipe = recipe_of(*names) if names is not None else tiny(Path("digits"))
    steps(tmp_path, recipe, [2])
    assert (tmp_path / "tensorboard").is_dir() == there


def test_a_tracker_that_is_not_installed_is_refused_before_anything_begins(
    few, tmp_path, monkeypatch
):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("a-package-that-is-nowhere",))
    with pytest.raises(
        ValueError, match="run.trackers: wandb is not installed: pip install a-pack"
    ):
        train(tiny(few, run={"trackers": ["wandb"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_wandb_made_is_no_installation(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("a-package-that-is-nowhere",))
    assert not trackers.installed("wandb")


def test_numbers_go_in_their_order_and_nobody_waits():
    let_go, found = threading.Event(), []

    def write(step, values):
        let_go.wait()
        found.append((step, values))

    tracker = Remote("slow", write, lambda finished: found.append(finished))
    for step in range(3):
        tracker.add(step, {"loss": 1.0})
    assert found == []
    let_go.set()
    assert tracker.close(True) == "" and found == [*((n, {"loss": 1.0}) for n in range(3)), True]


def test_what_is_lost_is_told_once(tmp_path, monkeypatch, capsys):
    """By the log, whose run goes on to its end."""
    wrote = []

    def write(step, values):
        wrote.append(step)
        raise ConnectionError("no network\nmore of that")

    tracker = Remote("far", write, lambda finished: None)
    monkeypatch.setattr("kdfuse.engine.run.log.opened", lambda *given: ([tracker], []))
    with RunLog(tmp_path, 8, 2) as log:
        log.step(1, 0.25, {"loss": 1.0}, 1.0, 0.0)
        while not tracker._error:
            time.sleep(0.01)
        for step in range(2, 9):
            log.step(step, step / 4, {"loss": 1.0}, 1.0, 0.0)
        log.end({})
    records = read(tmp_path / "log.jsonl")
    [note] = [record["text"] for record in records if record["kind"] == "note"]
    assert note == "far: ConnectionError: no network; the run goes on, numbers are missing there"
    assert capsys.readouterr().out.count("ConnectionError") == 1
    assert wrote == list(range(1, 9)) and records[-1]["kind"] == "end"


def test_at_its_end_a_run_waits_only_so_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remote, "PATIENCE", 0.01)
    hangs = threading.Event()
    tracker = Remote("far", lambda *given: hangs.wait(), lambda finished: None)
    monkeypatch.setattr("kdfuse.engine.run.log.opened", lambda *given: ([tracker], []))
    steps(tmp_path, None, [2], end=True)
    hangs.set()
    assert "far did not take all numbers within 0.01 s" in capsys.readouterr().out
    assert read(tmp_path / "log.jsonl")[-1]["kind"] == "end"


def test_one_that_cannot_begin_is_an_error_and_one_that_cannot_go_on_a_note(tmp_path, monkeypatch):
    def absent(folder, config, known):
        raise TrackerError("wandb: no key")

    monkeypatch.setitem(trackers.REMOTE, "wandb", absent)
    with pytest.raises(ValueError, match="run.trackers: wandb: no key; cure that or leave it out"):
        steps(tmp_path, recipe_of("wandb"), [2])
    (tmp_path / "trackers.json").write_text('{"wandb": "x"}')
    steps(tmp_path, recipe_of("wandb"), [2], resume=0)
    notes = [r["text"] for r in read(tmp_path / "log.jsonl") if r["kind"] == "note"]
    assert notes == ["wandb: no key; the run goes on without it"]
    (tmp_path / "trackers.json").write_text("[")
    with pytest.raises(ValueError, match=r"trackers\.json is damaged .* remove it"):
        steps(tmp_path, recipe_of("wandb"), [2], resume=0)


@pytest.fixture
def database(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="mlflow's database wants sqlalchemy")
    path = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return path


def test_mlflow_holds_the_run_and_goes_on_in_it(database, tmp_path):
    from mlflow import MlflowClient

    folder = tmp_path / "run"
    folder.mkdir()
    recipe = recipe_of("mlflow")
    steps(folder, recipe, [2, 4])
    client = MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("kdfuse").experiment_id])
    assert run.info.status == "KILLED" and run.info.run_name == "run"
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": run.info.run_id}
    assert run.data.params["optim.lr"] == "0.05" and run.data.params["method.name"] == "ce"
    steps(folder, recipe, [4, 6], resume=2, end=True)
    [run] = client.search_runs([run.info.experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "step/loss")
    assert sorted((m.step, m.value) for m in losses) == [
        (2, 0.5), (4, 0.25), (4, 0.25), (6, 1 / 6),
    ]  # fmt: skip
    assert run.data.metrics["epoch/top1"] == 50.0
    assert math.isnan(run.data.metrics["epoch/kl_teacher_to_slt0"])


def test_a_run_whose_mlflow_breaks_goes_on(database, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLog(folder, 8, 2, recipe=recipe_of("mlflow")) as log:
        database.write_bytes(b"no database any more" * 1000)
        for step in (2, 4, 6):
            log.step(step, step / 4, {"loss": 1.0}, 1.0, 0.0)
        log.end({})
    assert capsys.readouterr().out.count("mlflow: ") == 1
    assert read(folder / "log.jsonl")[-1]["kind"] in ("end", "note")
    steps(folder, recipe_of("mlflow"), [2], resume=0)
    notes = [r["text"] for r in read(folder / "log.jsonl") if r["kind"] == "note"]
    assert any(text.endswith("the run goes on without it") for text in notes)


@pytest.fixture
def offline(monkeypatch):
    """Weights & Biases that writes files alone."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    if not trackers.installed("wandb"):
        pytest.skip("wandb is not installed")  # a folder of that name is there
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)


def entries(raw):
    """What LevelDB's log format holds: blocks of 32 KiB, of records with checksum, length, type."""
    at, entry = 7, b""  # behind W&B's own head
    while at + 7 <= len(raw):
        if (left := -at % 32768) < 7 and left:
            at += left
            continue
        size, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        entry += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield entry
            entry = b""


def history(path):
    """What a file of Weights & Biases holds of its run: rows of values, and the settings."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, settings = [], {}
    for entry in entries(path.read_bytes()):
        record = Record()
        record.ParseFromString(entry)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        if record.WhichOneof("record_type") == "run":
            settings |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    return rows, settings


def test_wandb_holds_the_run_and_goes_on_in_it(offline, tmp_path):
    recipe = recipe_of("wandb")
    steps(tmp_path, recipe, [2, 4])
    known = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    time.sleep(1.1)  # its folders are named by the second
    steps(tmp_path, recipe, [4, 6], resume=2, end=True)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    assert [file.name for file in files] == [f"run-{known}.wandb"] * 2
    (first, settings), (second, _) = map(history, files)
    assert settings["optim.lr"] == 0.05 and settings["method.name"] == "ce"
    for rows, numbers in ((first, [2, 4]), (second, [4, 6])):
        found = [(row["step"], row["step/loss"]) for row in rows if "step/loss" in row]
        assert found == [(n, 1 / n) for n in numbers]
        assert [row["epoch/top1"] for row in rows if "epoch/top1" in row] == [50.0]
