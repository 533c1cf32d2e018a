"""A run that goes on with more processes or fewer sees every image once, in the planned order."""

import os
import signal

import pytest
from processes import together
from seen import epochs_of, planned, watched
from tiny import tiny

from kdfuse.engine import Stopped
from kdfuse.engine.run.log import read
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(20)

# A batch that three processes share unevenly; the last 20 images of an epoch are left out.
EPOCHS, BATCH, STEPS, ROWS = 3, 50, 6, 320


def leg(folder, until):
    """Train on, and be told to stop in step `until`."""
    run = {"epochs": EPOCHS, "batch": BATCH, "keep": 9}
    recipe = tiny(folder / "digits", "kd", optim={"lr": 0.05, "ema": 0.9}, run=run)

    def tell(task):
        if task.group.first and task.state.done == until:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with watched(folder / "seen", tell):
            train(recipe, folder / "run", resume="auto")
    except Stopped:
        assert until is not None


def test_two_one_two_three(digits, tmp_path):
    (tmp_path / "digits").symlink_to(digits)
    for world, until in ((2, 3), (1, 7), (2, 12), (3, None)):
        together(world, leg, tmp_path, until)
    seen = epochs_of(tmp_path / "seen", STEPS)
    assert seen == [planned(epoch, ROWS)[: STEPS * BATCH] for epoch in range(EPOCHS)]
    notes = [r["text"] for r in read(tmp_path / "run" / "log.jsonl") if r["kind"] == "note"]
    changed = [note.rpartition(": ")[2] for note in notes if "processes" in note]
    assert changed == ["2 -> 1", "1 -> 2", "2 -> 3"]
    assert read(tmp_path / "run" / "log.jsonl")[-1]["kind"] == "end"
