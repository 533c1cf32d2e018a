"""A clock that jumps during a run, back by a day and on by a year, changes nothing of it."""

import time
from itertools import cycle

from same import assert_same_run
from tiny import tiny

from kdfuse.engine.training.start import train


def test_a_run_reads_no_clock_that_can_be_set(few, tmp_path, monkeypatch):
    recipe = tiny(few, "kd", run={"checkpoint_every": 3, "keep": 9, "time_limit": 600.0})
    whole = train(recipe, tmp_path / "whole")
    jumps, usual = cycle((0.0, -86400.0, 3.15e7, -1e9)), time.time
    monkeypatch.setattr(time, "time", lambda: usual() + next(jumps))
    run = train(recipe, tmp_path / "run")
    assert_same_run(run, whole, 10)
