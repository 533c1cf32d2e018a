"""Runs beside their disk: steps go on while a checkpoint is written, and when it cannot be."""

import re
import threading

import pytest
from disks import fill, small_disk
from tiny import tiny

from kdfuse.engine.run import checkpoint
from kdfuse.engine.run.checkpoint import CheckpointError, load
from kdfuse.engine.run.log import RunLog, read
from kdfuse.engine.training.classification import Classification
from kdfuse.engine.training.loop import Loop
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(20)

CLOCK = ("time", "images_per_s", "data_wait")
SECONDS = 60  # after which a test that hangs fails
RUN = {"epochs": 2, "checkpoint_every": 2, "keep": 9}


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The run of ten steps that nothing happened to."""
    return train(tiny(digits, "ce", run=RUN), tmp_path_factory.mktemp("whole") / "run")


def without_clock(run):
    records = [record for record in read(run / "log.jsonl") if record["kind"] != "note"]
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


def notes(run):
    return [record["text"] for record in read(run / "log.jsonl") if record["kind"] == "note"]


def files(run, name):
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / name).iterdir()}


@pytest.fixture
def events(monkeypatch):
    """What happens in a run, in order; a checkpoint is held up until the step of `until[name]`."""
    found, until, reached = [], {}, {}
    save, step, end = checkpoint.save, Classification.step, RunLog.end

    def held(folder, name, *given, **options):
        if name in until:
            assert reached.setdefault(until[name], threading.Event()).wait(SECONDS)
        path = save(folder, name, *given, **options)
        found.append(name)
        return path

    def stepped(task, batch):
        terms = step(task, batch)
        found.append(task.state.done + 1)
        reached.setdefault(found[-1], threading.Event()).set()
        return terms

    def ended(log, values):
        found.append("end")
        end(log, values)

    monkeypatch.setattr(checkpoint, "save", held)
    monkeypatch.setattr(Classification, "step", stepped)
    monkeypatch.setattr(RunLog, "end", ended)
    return found, until


def test_steps_are_taken_while_a_checkpoint_is_written(digits, whole, tmp_path, events):
    found, until = events
    until |= {"step-00000002": 4, "step-00000006": 7}
    run = train(tiny(digits, "ce", run=RUN), tmp_path / "run")
    at = {event: i for i, event in enumerate(found)}
    assert at[4] < at["step-00000002"] < at["step-00000004"] < at[7] < at["step-00000006"]
    assert found[-2:] == ["step-00000010", "end"]
    for name in ("step-00000002", "step-00000006", "step-00000010", "best"):
        assert files(run, name) == files(whole, name), name
    assert without_clock(run) == without_clock(whole)


def test_the_end_of_a_run_is_written_after_its_last_checkpoint(digits, tmp_path, monkeypatch):
    seen, save = {}, checkpoint.save

    def late(folder, name, *given, **options):
        if name == "step-00000010":
            threading.Event().wait(0.3)
        seen[name] = [record["kind"] for record in read(tmp_path / "run" / "log.jsonl")]
        return save(folder, name, *given, **options)

    monkeypatch.setattr(checkpoint, "save", late)
    run = train(tiny(digits, "ce", run=RUN), tmp_path / "run")
    assert seen["step-00000010"][-1] == "epoch" and "end" not in seen["step-00000010"]
    assert read(run / "log.jsonl")[-1]["kind"] == "end"


def test_ctrl_c_waits_for_the_checkpoint_on_its_way(digits, whole, tmp_path, monkeypatch):
    save, step = checkpoint.save, Classification.step

    def late(*given, **options):
        threading.Event().wait(0.3)
        return save(*given, **options)

    def stopped(task, batch):
        if task.state.done == 2:
            raise KeyboardInterrupt
        return step(task, batch)

    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(Classification, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(digits, "ce", run=RUN), tmp_path / "run")
    assert files(tmp_path / "run", "step-00000002") == files(whole, "step-00000002")


def after_epoch(monkeypatch, epoch, then):
    """Do something once an epoch is over and its checkpoint written, or not."""
    finish = Loop.finish_epoch

    def finished(loop, number, log):
        finish(loop, number, log)
        if number == epoch:
            loop.writer._thread.join()
            then()

    monkeypatch.setattr(Loop, "finish_epoch", finished)


@pytest.mark.parametrize("left", [0, 100_000], ids=["not a byte", "a little"])
def test_a_run_goes_on_through_a_full_disk(left, digits, whole, tmp_path, monkeypatch, capsys):
    """It is full from before the first checkpoint to the end of the first epoch."""
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        epoch = Classification.epoch
        fillers = []

        def full(task, number, start):
            if number == 0:
                fillers.append(fill(disk, left))
            return epoch(task, number, start)

        monkeypatch.setattr(Classification, "epoch", full)
        after_epoch(monkeypatch, 1, lambda: fillers.pop().unlink())
        run = train(tiny(digits, "ce", run=RUN), disk / "run")
        printed = capsys.readouterr().out
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert kept[-3:] == ["step-00000006", "step-00000008", "step-00000010"]
        assert not {"step-00000002", "step-00000004"} & set(kept)
        said = [text for text in notes(run) if "the run goes on without it" in text]
        for text, name in zip(said, ("step-00000002", "step-00000004", "best"), strict=True):
            assert re.match(rf"checkpoint \S+/{name}: cannot write \S+: No space left", text), text
            assert re.search(r"its tensors alone take \d{3},\d{3} bytes, the disk has \d", text), (
                text
            )
            assert text in printed
        assert files(run, "step-00000010") == files(whole, "step-00000010")
        assert without_clock(run) == without_clock(whole)


def test_a_run_whose_last_checkpoint_cannot_be_written_fails(digits, whole, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        fillers = []
        after_epoch(monkeypatch, 1, lambda: fillers.append(fill(disk, 100_000)))
        recipe = tiny(digits, "ce", run=RUN | {"checkpoint_every": None})
        with pytest.raises(CheckpointError, match=r"step-00000010: cannot write .* too few$"):
            train(recipe, disk / "run")
        assert not [r for r in read(disk / "run" / "log.jsonl") if r["kind"] == "end"]
        assert load(disk / "run" / "checkpoints" / "step-00000005")
        monkeypatch.undo()
        fillers.pop().unlink()
        run = train(recipe, disk / "run", resume=True)
        theirs = [r for r in without_clock(whole) if r["kind"] in ("epoch", "end")]
        assert [r for r in without_clock(run) if r["kind"] in ("epoch", "end")] == theirs


@pytest.mark.parametrize("left", [0, 4096, 8192, 12288, 16384])
def test_a_run_that_begins_on_a_full_disk_says_so_in_a_line(left, digits, tmp_path, kd):
    """Files take whole pages here: environment.json, recipe.yaml, log.jsonl, TensorBoard's."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(tiny(digits, "ce", run=RUN).explain())
        fill(disk, left)
        result = kd("train", recipe, "--out", disk / "run")
        assert result.code == 2 and "Traceback" not in result.err, result.err
        (line,) = result.err.splitlines()
        assert line.startswith("error: ") and "No space left on device" in line
        assert str(disk / "run") in line
        assert not list((disk / "run").glob("*.tmp"))
