"""Going back to a checkpoint where too many steps in a row are not finite: once in a run."""

from __future__ import annotations

from pathlib import Path

from .meters import Diverged, NotFinite
from .ranks import Group
from .task import Task


def go_back(fault: NotFinite, task: Task, group: Group, checkpoints: Path) -> list[str]:
    """Restore the state of a checkpoint of before the fault, all of which are on the disk.

    Notes for the log. Raises Diverged, with the images of the first step, where there is none, and
    where the run went back before.
    """
    optim, first = task.state.recipe.optim, fault.row.first
    named = group.all(task.images(*divmod(first - 1, task.steps)))
    # Of a step with a finite loss nobody knows the rank: gradients are averaged when looked at.
    ranks = list(fault.row.terms)[:1] or range(group.world)
    images = "".join(
        f"\nimages of step {first} on rank {rank}:\n  " + "\n  ".join(named[rank]) for rank in ranks
    )
    notes = task.state.go_back(checkpoints, first) if optim.skips else []
    if not notes:
        none = optim.skips and task.state.went_back is None
        why = ", as there is no checkpoint of before it to go back to" if none else ""
        raise Diverged(
            f"{fault}: stopped{why}, checkpoints before it are kept; lower optim.lr, add "
            f"optim.warmup_epochs or look at the data{images}"
        ) from fault
    rate = f", at {optim.rollback_lr:g} of the rate" if optim.rollback_lr < 1 else ""
    return [f"{fault}: the run goes back, once{rate}{images}", *notes]
