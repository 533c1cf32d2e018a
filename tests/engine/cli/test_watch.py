"""A run that others watch: while it grows, is killed, goes on, and where it stands meanwhile."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pty")

from terminals import Terminal, screen  # noqa: E402

from kdfuse.engine.cli import watch as watch_module  # noqa: E402
from kdfuse.engine.cli.watch import FINISHED, Row, Watched, watch  # noqa: E402
from kdfuse.engine.run import lease  # noqa: E402
from kdfuse.engine.run.display import Display  # noqa: E402
from kdfuse.engine.run.lease import held  # noqa: E402
from kdfuse.engine.run.log import RunLog  # noqa: E402

pytestmark = pytest.mark.slow(15)

HERE = f"running: process {os.getpid()} on "
RESUME = "resume with: kdfuse train digits/ce --out 'a b' resume=true"


@pytest.fixture
def run(tmp_path):
    """A run's folder, with what says how it was begun."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: x\n")
    command = ["/bin/kdfuse", "train", "digits/ce", "--out", "a b", "resume=auto"]
    (folder / "environment.json").write_text(json.dumps({"command": command}))
    return folder


@pytest.fixture
def look(run, capsys):
    """Looks at the run once more: the lines that this shows, of what the run itself shows none."""
    watched = Watched(run, Display())

    def again():
        capsys.readouterr()
        watched.look()
        return capsys.readouterr().out.splitlines()

    again.watched = watched
    return again


def step(log, step):
    log.step(step, step / 4, {"loss": 1.0}, 100.0, 0.0)


def write_lease(run, **facts):
    own = {**lease._machine(), "pid": os.getpid(), "token": "0" * 32, "since": "then"}
    (run / lease.NAME).write_text(json.dumps({**own, **facts}))


def test_a_run_is_seen_from_its_begin_to_its_end(run, look):
    kept = run.rename(run.with_name("later"))
    assert look() == [f"waiting for {run} to begin; Ctrl-C ends it"] and look() == []
    kept.rename(run)
    with held(run):
        [line] = look()
        assert line.startswith(HERE)
        with RunLog(run, 8, 2) as log:
            log.note("a note")
            assert look() == ["a note"]
            step(log, 4)
            assert look() == [] and look.watched.display.standing.step == 4
            log.epoch(1, {"top1": 50.0})
            [row] = look()
            assert row.startswith("epoch 1/2  top1 50  img/s 100")
            step(log, 8)
            log.epoch(2, {"top1": 60.0})
            log.end({"best_top1": 60.0})
            last, end = look()
            assert last.startswith("epoch 2/2  top1 60") and end == "finished  best_top1 60"
    assert look.watched.why == FINISHED and look() == []


def test_a_line_is_read_once_it_is_whole(run, look):
    with held(run), RunLog(run, 8, 2) as log:
        look()
        with log.path.open("ab") as file:
            note = json.dumps({"kind": "note", "step": 0, "epoch": 0, "time": 1, "text": "whole"})
            file.write(note[:20].encode())
            file.flush()
            assert look() == []
            file.write(note[20:].encode() + b"\n")
            file.flush()
            assert look() == ["whole"]


def test_a_run_that_goes_on_from_a_checkpoint_takes_back_what_came_later(run, look):
    with held(run):
        with RunLog(run, 8, 2) as log:
            step(log, 4)
            log.epoch(1, {"top1": 50.0})
            step(log, 8)
            log.epoch(2, {"top1": 60.0})
        assert len(look()) == 3
        with RunLog(run, 8, 2, resume_step=4) as log:
            step(log, 6)
            assert look()[0] == "resumed from step 4"
            assert look.watched.display.standing.step == 6
            step(log, 8)
            log.epoch(2, {"top1": 70.0})
            [row] = look()
            assert row.startswith("epoch 2/2  top1 70")
        with RunLog(run, 8, 2, resume_step=8):
            assert look()[0] == "resumed from step 8"  # and nothing of it was taken back


def test_a_run_that_stopped_says_how_it_goes_on(run, look):
    with held(run), RunLog(run, 8, 2) as log:
        step(log, 4)
        look()
        assert look.watched.why == ""
    assert look() == [f"stopped at step 4; {RESUME}"] == [look.watched.why]
    assert look() == []
    with held(run), RunLog(run, 8, 2, resume_step=4):
        assert look()[0] == "resumed from step 4" and look.watched.why == ""


@pytest.mark.parametrize(
    "facts", ["{", '{"command": "kdfuse train"}', '{"command": ["train.py", "train"]}', None]
)
def test_a_run_of_ones_own_program_is_said_to_go_on(facts, run, look):
    (run / "environment.json").unlink()
    if facts is not None:
        (run / "environment.json").write_text(facts)
    assert look() == ["stopped at step 0; resume=True in the call that began it goes on"]


def test_a_run_that_was_killed(run, look):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    write_lease(run, pid=gone.pid)
    [line] = look()
    assert line.startswith(f"killed, process {gone.pid} on ") and line.endswith(RESUME)
    assert look.watched.why == line


def test_of_another_machine_a_lease_that_stands_still_is_of_a_run_that_is_gone(
    run, look, monkeypatch
):
    monkeypatch.setattr(lease, "LOOKS", 3)
    write_lease(run, host="elsewhere")
    assert look()[0].startswith("running: process")
    assert look() == [] == look()
    os.utime(run / lease.NAME, (1, 1))  # it is renewed
    assert look() == [] == look() == look()
    assert look()[0].startswith("killed, process")


def test_a_damaged_log_is_named(run, look):
    (run / "log.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"log\.jsonl line 1 is no record"):
        look()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        watch([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"file is not a run directory: it is a file"):
        watch([tmp_path / "file"])


def test_a_set_is_over_when_none_of_it_has_trained_for_a_while(run, capsys, monkeypatch):
    """Between two of its runs nobody is at work."""
    monkeypatch.setattr(watch_module, "PAUSE", 0)
    monkeypatch.setattr(watch_module, "QUIET", 3)
    looks = []
    seen = watch_module.Watched.look

    def look(watched):
        looks.append(watched.folder)
        if len(looks) == 3:  # the next one begins, and ends
            finish(run.with_name("second"))
        seen(watched)

    def finish(folder):
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text("name: x\n")
        with RunLog(folder, 8, 2) as log:
            log.end({})

    finish(run)
    monkeypatch.setattr(watch_module.Watched, "look", look)
    assert watch([run.parent]) is True
    assert looks == [run] * 3 + [run, run.with_name("second")] * 1
    assert "second: finished" in capsys.readouterr().out


def test_several_runs_each_have_a_line(run, capsys):
    other = run.with_name("other")
    for folder, ends in ((run, True), (other, False)):
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text("name: x\n")
        with RunLog(folder, 8, 2) as log:
            step(log, 4)
            log.epoch(1, {"top1": 50.0})
            if ends:
                log.end({})
    capsys.readouterr()
    assert watch([run, other]) is False
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(f) for f in (run, run, other, other)]
    assert lines[0].startswith(f"{run}: epoch 1/2  top1 50") and lines[1] == f"{run}: finished"
    row = Row("name", printed=False)
    watched = Watched(other, row)
    watched.look()
    assert row.line(60) == "name  stopped at step 4  epoch 1.00/2  loss 1  100 img/s"
    assert row.line(10) == "name  stop"


@pytest.mark.slow(15)
def test_a_run_that_is_killed_is_watched_by_another_program(digits, tmp_path, kd):
    """From before it begins until it is no more."""
    run = tmp_path / "run"
    main = "from kdfuse.engine.cli.main import main; main()"
    words = ["train", "digits/ce:resnet8", f"data.root={digits}", "run.epochs=300", "data.subset=8"]
    words += ["run.device=cpu", "run.threads=1", "run.speed=exact", "--out", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    with Terminal(100, main, "watch", run) as terminal:
        terminal.until("waiting for")
        command = [sys.executable, "-c", main, *words]
        training = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        terminal.until("     loss")  # of the table; the line has a step's before an epoch ends
        training.kill()
        terminal.until("killed, process")
        terminal.until()
        assert terminal.process.wait() == 1
        rows, cursor = screen(terminal.seen, 100)
        training.wait()
    assert cursor and f"process {training.pid}" in terminal.seen
    assert any(row.split()[:2] == ["epoch", "loss"] for row in rows), rows
    assert any("1/300" in row for row in rows)
    again = kd("watch", run)
    assert again.code == 1 and re.search(r"^epoch 1/300  loss", again.out, re.MULTILINE)
