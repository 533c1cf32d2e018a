"""What a run shows: on terminals of several widths, on one that changes, and on none."""

import re

import pytest

pytest.importorskip("pty")

from terminals import Terminal, screen  # noqa: E402

from kdfuse.engine.run.log import RunLog  # noqa: E402
from kdfuse.engine.run.standing import Standing, duration  # noqa: E402

pytestmark = pytest.mark.slow(15)

BEGIN = """
import sys
import time
from pathlib import Path
from kdfuse.engine.run.log import RunLog
terms = {"loss": 1.5, "kd": 0.25, **{f"slt{i}_kd": 0.125 for i in range(60)}}
scores = {"top1": 54.0, "top5": 90.0, "slt0_top1": 61.0, "train_loss": 2.0, "lr": 0.1}
def go(then=lambda: None):
    with RunLog(Path(sys.argv[1]), 8, 2) as run:
        for step in (2, 4):
            run.step(step, step / 4, terms, 1234.0, 0.25)
        run.epoch(1, scores)
        then()
        run.note("[brackets] stay")
        run.step(8, 2.0, terms, 2000.0, 0.0)
        run.epoch(2, {**scores, "ema_top1": 55.0})
        run.end({"best_top1": 54.0})
"""


def cells(row):
    return row.split()


def test_a_line_that_stays_and_a_table_above_it(tmp_path):
    with Terminal(120, BEGIN + "go()", tmp_path) as terminal:
        terminal.until()
    rows, cursor = screen(terminal.seen, 120)
    assert cursor
    line = r"epoch 1\.00/2  loss 1\.5  1,234 img/s  ETA \d:\d\d  data wait 25%  step 4/8  kd 0\.25"
    assert re.search(line, terminal.seen)
    names = ["epoch", "loss", "top1", "slt0_top1", "img/s", "wait", "ETA", "top5", "lr"]
    assert cells(rows[0]) == names
    first = dict(zip(names, cells(rows[1]), strict=True))
    assert re.fullmatch(r"\d:\d\d", first.pop("ETA"))
    assert first == {
        "epoch": "1/2", "loss": "2", "top1": "54", "slt0_top1": "61", "img/s": "1,234",
        "wait": "25%", "top5": "90", "lr": "0.1",
    }  # fmt: skip
    assert rows[2] == "[brackets] stay"
    assert cells(rows[3])[:5] == ["epoch", "loss", "top1", "slt0_top1", "ema_top1"]  # a new column
    assert cells(rows[4])[:6] == ["2/2", "2", "54", "61", "55", "2,000"]
    assert [row for row in rows[5:] if row] == ["finished  best_top1 54"]


@pytest.mark.parametrize(("columns", "fit"), [(40, 4), (20, 2)])
def test_narrow_terminals(columns, fit, tmp_path):
    with Terminal(columns, BEGIN + "go()", tmp_path) as terminal:
        terminal.until()
    rows, cursor = screen(terminal.seen, columns)
    assert cursor and all(len(row) < columns for row in rows[:-2])
    assert cells(rows[0]) == ["epoch", "loss", "top1", "slt0_top1"][:fit]
    assert cells(rows[1]) == ["1/2", "2", "54", "61"][:fit]
    assert "epoch 1.00/2" in terminal.seen and "slt0_kd" not in terminal.seen
    assert sum("epoch 1.00/2" in row for row in rows) == 0  # the line is gone with its end


def test_a_terminal_that_becomes_narrow(tmp_path):
    with Terminal(120, BEGIN + "go(input)", tmp_path) as terminal:
        terminal.until("54")
        terminal.resize(40)
        terminal.type("\n")
        rest = terminal.until("finished")
        terminal.until()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", rest))
    head = next(line for line in lines if "loss" in line and "top1" in line)
    assert cells(head) == ["epoch", "loss", "top1", "slt0_top1"]
    assert screen(terminal.seen, 120)[1]


@pytest.mark.parametrize("how", ["error", "Ctrl-C", "kill -9"])
def test_a_run_that_ends_early_leaves_the_terminal_as_it_was(how, tmp_path):
    # Ctrl-C on the way into a read that waits would be seen behind it; a nap is short.
    waits = "int(input())" if how == "error" else "[time.sleep(0.05) for _ in iter(int, 1)]"
    with Terminal(100, f"{BEGIN}go(lambda: print('now') or {waits})", tmp_path) as terminal:
        terminal.until("now")
        if how == "kill -9":
            terminal.process.kill()
        else:
            terminal.type({"error": "none\n", "Ctrl-C": "\x03"}[how])
        terminal.until()
        rows, cursor = screen(terminal.seen, 100)
    assert cursor
    if how != "kill -9":
        assert rows[-2].startswith({"error": "ValueError", "Ctrl-C": "KeyboardInterrupt"}[how])
        kept = next(row for row in rows if row.startswith("epoch 1.00/2"))
        assert "step 4/8" in kept and "ETA" not in kept


def test_who_is_killed_leaves_a_cursor(tmp_path):
    """At every moment: it is brought back before anything else is written."""
    with Terminal(100, BEGIN + "go()", tmp_path) as terminal:
        terminal.until()
    hidden = [after[:6] for after in terminal.seen.split("\x1b[?25l")[1:]]
    assert hidden == ["\x1b[?25h"]


def test_output_that_is_colourful_is_no_terminal(tmp_path, monkeypatch, capsys):
    """Continuous integration asks for colours, and has a file for output."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunLog(tmp_path, 8, 2) as run:
        run.step(4, 1.0, {"loss": 1.0}, 100.0, 0.0)
        run.epoch(1, {"top1": 50.0})
    assert re.fullmatch(r"epoch 1/2  top1 50  img/s 100  wait 0%\n", capsys.readouterr().out)


def records(*given):
    """Step records of 100 epochs of 10 steps: (step, time, images a second, share of waiting)."""
    yield {"kind": "start", "step": 0, "epoch": 0.0, "time": 0.0, "steps": 1000, "epochs": 100}
    for step, time, speed, wait in given:
        values = {"loss": None, "images_per_s": speed, "data_wait": wait}
        yield {"kind": "step", "step": step, "epoch": step / 10, "time": time, **values}


def standing(*given, since=0.0):
    found = Standing(since)
    for record in records(*given):
        found.add(record)
    return found


def test_what_is_left_follows_from_the_last_epoch():
    """Compiling, before the first record, is no part of it; what is between steps is."""
    assert standing((5, 500.0, 1.0, 0.0)).left(500.0) is None
    found = standing((5, 500.0, 1.0, 0.0), (10, 510.0, 1.0, 0.0))
    assert found.left(510.0) == 990 * 2 and found.left(610.0) == 990 * 2 - 100
    assert found.left(0.0) == 990 * 2 and found.left(1e9) == 0  # another machine's clock
    slow = [(10 * n, 100.0 * n, 1.0, 0.0) for n in range(1, 6)]
    fast = [(50 + 10 * n, 500.0 + n, 1.0, 0.0) for n in range(1, 4)]
    assert standing(*slow, *fast).left(503.0) == pytest.approx(920 * 0.1)
    stopped_for_long = [(5, 1.0, 1.0, 0.0), (10, 2.0, 1.0, 0.0), (15, 1e6, 1.0, 0.0)]
    gone_on = [(20, 1e6 + 1, 1.0, 0.0)]
    assert standing(*stopped_for_long, *gone_on, since=1e6 - 10).left(1e6 + 1) == 980 / 5


def test_the_speed_of_an_epoch_is_that_of_its_images():
    """A step at 100 images a second takes as long as 3 at 300; half of it is waiting."""
    found = standing((1, 1.0, 100.0, 0.5), (10, 2.0, 300.0, 0.0))
    found.add({"kind": "epoch", "step": 10, "epoch": 1.0, "time": 3.0, "train_loss": None})
    assert found.row["img/s"] == "250" and found.row["wait"] == "12%"
    assert found.row["loss"] == "nan"


def test_a_line_takes_whole_parts():
    found = standing((5, 1.0, 1234.0, 0.25))
    whole = "epoch 0.50/100  loss nan  1,234 img/s  data wait 25%  step 5/1000"
    assert found.line(200) == whole == found.line(len(whole))
    assert found.line(len(whole) - 1) == whole.rpartition("  step")[0]
    assert found.line(5) == "epoch"
    found.doing = "compiling student"
    assert found.line(40) == "epoch 0.50/100  compiling student"


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 360000)] == [
        "0:00", "1:00", "59:59", "1:00:00", "100:00:00",
    ]  # fmt: skip
