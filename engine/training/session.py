"""A recipe's data, networks and step for a loop of one's own, without a run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from torch import nn

from ..data.batch import Batch
from ..methods import Terms
from ..recipe.load import Recipe
from ..run.chain import trained
from ..run.folder import Resume
from .classification import Classification
from .compiled import compiling
from .learner import Learner
from .process import settings
from .ranks import Group, join
from .rate import lr_at
from .speed import settled


class Session:
    """What `session` makes of a recipe: batches, the step that trains on them, the evaluation.

    Nothing is written or resumed. Batches have uint8 images (B, 3, H, W) and labels (B,), on the
    run's device; `steps` of them are an epoch. Behind its `with` a session raises RuntimeError.
    """

    def __init__(self, recipe: Recipe, task: Classification) -> None:
        self.recipe, self.steps = recipe, task.steps
        self._open: Classification | None = task

    @property
    def _task(self) -> Classification:
        if self._open is None:
            raise RuntimeError("the session is over; use it within `with session(recipe) as ...`")
        return self._open

    @property
    def learner(self) -> Learner:
        """Student, SL-Ts and head; `learner.deployed` is the network that is evaluated."""
        return self._task.networks.main

    @property
    def student(self) -> nn.Module:
        """The student as it is trained."""
        return self.learner.student

    @property
    def group(self) -> Group:
        """The processes that train it; all have to make the same calls."""
        return self._task.group

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch of the plan, 0-based, from its step `start` on. There is one for
        any epoch; the schedule has run.epochs."""
        return self._task.epoch(epoch, start)

    def step(self, batch: Batch, lr: float | None = None) -> Terms:
        """Train on a batch: one step of every optimiser. Waits for no device.

        `lr`: the learning rate; None: the schedule's, for as many steps as were taken before. What
        comes back are detached 0-dim tensors: the loss and its terms, counts of top1 and top5.
        Raises ValueError without `lr` once run.epochs are over.
        """
        state, optim, run = self._task.state, self.recipe.optim, self.recipe.run
        epoch, number = divmod(state.done, self.steps)
        if lr is None and epoch >= run.epochs:
            raise ValueError(
                f"lr: the schedule is of run.epochs = {run.epochs}, and {state.done} steps of "
                f"{self.steps} an epoch are done; give lr, or run.epochs more"
            )
        rate = lr_at(optim, run, state.done / self.steps) if lr is None else lr
        state.begin(rate, self._task.schedule(epoch, number))
        terms = self._task.step(batch)
        state.done += 1
        return terms

    def means(self) -> dict[str, float]:
        """Means of the terms since the last call, top1 and top5 in percent; waits for the device.

        Raises Diverged for more steps that were not finite than optim.skip_limit.
        """
        return self._task.state.meters.read()

    def evaluate(self) -> dict[str, float]:
        """Percent on the validation set: top1, top5, and of each SL-T slt0_top1, ..."""
        return self._task.evaluate()


def _refuse(recipe: Recipe, folder: Path, resume: Resume) -> Path:
    raise ValueError(
        f"trained_by: {recipe.name} is not trained first by a session; give the network's "
        "checkpoint, as in teacher.checkpoint=FOLDER"
    )


@contextmanager
def session(recipe: Recipe) -> Iterator[Session]:
    """Within, a recipe's data, networks and step are there for a loop of one's own.

    The process has the threads and numerics of `run` meanwhile. Under torchrun every process
    calls it. Raises ValueError and FileNotFoundError for what cannot be opened.
    """
    recipe = trained(recipe, Path(), _refuse)
    group = join(recipe.run.device, recipe.run.timeout)
    recipe = settled(recipe, group.device)
    with (
        settings(recipe.run),
        compiling(bool(recipe.run.compile)),
        closing(Classification(recipe, group)) as task,
    ):
        found = Session(recipe, task)
        try:
            yield found
        finally:
            found._open = None
