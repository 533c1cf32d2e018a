"""A file that was bad once stays out: in later epochs, other processes and resumed runs."""

import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import together
from same import assert_same
from seen import epochs_of, planned, watched
from tiny import tiny

from kdfuse.engine.data.sources import open_source
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(15)

EPOCHS, STEPS, BATCH, ROWS = 3, 10, 16, 160
ROW = planned(0, ROWS)[-1]  # of the last step, and of the last process
REPLACED = [[ROW + 1 if row == ROW else row for row in planned(e, ROWS)] for e in range(EPOCHS)]
LOADERS = [
    "torchvision",
    pytest.param(
        "dali", marks=pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs DALI")
    ),
]


def recipe_of(folder, loader):
    run = {"epochs": EPOCHS, "batch": BATCH, "checkpoint_every": 6, "keep": 9}
    return tiny(folder / "digits", "ce", data={"loader": loader, "subset": 16}, run=run)


def losing(folder, loader, out):
    """A run whose file goes in its first step, and is back once a process has missed it."""
    recipe = recipe_of(folder, loader)
    path, away = Path(open_source(recipe.data, "train").name(ROW)), folder / "away"

    def change(task):
        missed = any(task.group.all(ROW in task.loader.quarantine.bad))
        if task.group.first and task.state.done == 0:
            path.rename(away)
        if task.group.first and missed and away.exists():
            away.rename(path)

    with watched(folder / f"{out}-seen", change), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train(recipe, folder / out)
    assert path.exists()


def resumed(loader, folder, out):
    """The run of the folder `out` goes on from step 12 with the file in its place."""
    shutil.copytree(folder / out, folder / "resumed")
    for path in (folder / "resumed" / "checkpoints").glob("step-*"):
        if path.name > "step-00000012":
            shutil.rmtree(path)
    with watched(folder / "resumed-seen"):
        train(recipe_of(folder, loader), folder / "resumed", resume=True)
    seen = [row for epoch in epochs_of(folder / "resumed-seen", STEPS) for row in epoch]
    assert len(seen) == 18 * BATCH and ROW not in seen


@pytest.fixture
def folder(few, tmp_path):
    """With digits of its own."""
    shutil.copytree(few, tmp_path / "digits")
    return tmp_path


@pytest.mark.parametrize("loader", LOADERS)
def test_it_stays_out_and_a_resumed_run_knows(loader, folder):
    losing(folder, loader, "whole")
    assert epochs_of(folder / "whole-seen", STEPS) == REPLACED
    resumed(loader, folder, "whole")
    last = f"checkpoints/step-{EPOCHS * STEPS:08d}"
    assert_same(load(folder / "resumed" / last)[0], load(folder / "whole" / last)[0])


@pytest.mark.parametrize("loader", LOADERS)
def test_all_processes_leave_it_out(loader, folder):
    together(2, losing, folder, loader, "two")
    assert epochs_of(folder / "two-seen", STEPS) == REPLACED
    resumed(loader, folder, "two")  # by one process, which knows what the second had found
