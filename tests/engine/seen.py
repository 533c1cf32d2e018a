"""What each step of a run sees, written down by its first process."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np

from kdfuse.engine.data.plan import permutation
from kdfuse.engine.training.classification import Classification


def watched(folder: Path, before: Callable[[Classification], None] | None = None):
    """A context in which the rows of each global batch go to folder/STEP.npy, STEP from 0.

    `before` is called with the task at each step, in every process.
    """
    folder.mkdir(exist_ok=True)
    usual = Classification.step

    def step(self, batch):
        of_all = self.group.all(batch.index.tolist())
        if self.group.first:
            np.save(folder / f"{self.state.done}.npy", np.concatenate(of_all))
        if before is not None:
            before(self)
        return usual(self, batch)

    return patch.object(Classification, "step", step)


def epochs_of(folder: Path, steps: int) -> list[list[int]]:
    """The rows of each epoch of so many steps, in their order."""
    found = sorted(folder.iterdir(), key=lambda path: int(path.stem))
    seen = [np.load(path) for path in found]
    return [np.concatenate(seen[i : i + steps]).tolist() for i in range(0, len(seen), steps)]


def planned(epoch: int, rows: int, seed: int = 0) -> list[int]:
    """The rows of an epoch as the plan has them."""
    return permutation(seed, epoch, rows).tolist()
