"""Going on with a run from its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..recipe.load import AnyRecipe, Recipe
from ..run.checkpoint import BEST, CheckpointError, load
from ..run.resume import starts_again
from .peers import from_first, together
from .ranks import Group
from .task import Task


def resumed(
    task: Task,
    group: Group,
    folder: Path,
    steps: int,
    lr: Callable[[int], float],
) -> list[str]:
    """Bring the task's state to the newest good checkpoint of a run of so many steps: notes for
    the log. `lr`: the rate of a step of the run, 0-based.

    Raises ValueError when recipe, data or teacher are not those of the checkpoint.
    """
    state, checkpoints = task.state, folder / "checkpoints"
    notes = state.restore(checkpoints)
    if group.world > 2 and 0 < state.done < steps:
        _rehearse(task, lr)
        state.restore(checkpoints)
    doing = "looking at the run's folder"
    if state.done == 0:
        notes += together(group, doing, lambda: starts_again(folder) if group.first else [])
    if "best" in state.results:
        lost = together(group, doing, lambda: _lost(checkpoints / BEST) if group.first else "")
        if lost := from_first(group, lost, doing):
            del state.results["best"]
            notes.append(f"{lost}: the best one is lost, and is sought anew from here on")
    return notes


def again(recipe: AnyRecipe) -> str:
    """What goes on with a run of this recipe that was stopped, in words."""
    own = isinstance(recipe, Recipe) and recipe.data.source == "own"
    return "the same call of distill" if own else "resume=true"


def _lost(best: Path) -> str:
    """What is wrong with a checkpoint, "" for nothing."""
    try:
        load(best)
    except CheckpointError as error:
        return str(error)
    return ""


def _rehearse(task: Task, lr: Callable[[int], float]) -> None:
    """Take the coming step of a resumed run, for its state to be restored again.

    DistributedDataParallel moves gradients to other places in its buckets after its second step,
    and with three processes or more the place decides in which order they are summed.
    """
    state = task.state
    epoch, number = divmod(state.done, task.steps)
    for batch in task.epoch(epoch, number):
        for _ in range(min(state.done, 2)):
            state.begin(lr(state.done), task.schedule(epoch, number))
            task.step(batch)
        break
