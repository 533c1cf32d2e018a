"""The learning rate of a run at any moment."""

from __future__ import annotations

import math

from ..recipe.optim import Optim
from ..recipe.run import Run


def lr_at(optim: Optim, run: Run, epoch: float) -> float:
    """The learning rate at `epoch` finished epochs (a step's: its number / steps per epoch).

    Warm-up grows linearly from 0 to the schedule's own rate. "step" multiplies by gamma from each
    milestone on; "cosine" falls from the end of the warm-up to min_lr at run.epochs. All of it,
    min_lr too, is multiplied by `batch_factor`. Raises ValueError when the warm-up leaves the
    cosine no epoch.
    """
    rate = optim.lr
    if optim.schedule == "step":
        rate *= optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)
    if optim.schedule == "cosine":
        span = run.epochs - optim.warmup_epochs
        if span <= 0:
            raise ValueError(
                f"optim.warmup_epochs: {optim.warmup_epochs} leaves none of run.epochs={run.epochs}"
                " for the cosine; lower it"
            )
        done = min(max(epoch - optim.warmup_epochs, 0.0) / span, 1.0)
        rate = optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * done)) / 2
    if epoch < optim.warmup_epochs:
        rate *= epoch / optim.warmup_epochs
    return rate * batch_factor(optim, run.batch)


def batch_factor(optim: Optim, batch: int) -> float:
    """What the rate is multiplied by for a global batch of `batch` images.

    "linear" is batch / scale_batch (Goyal et al. 2017), "sqrt" its square root, which keeps the
    variance of a step (Krizhevsky 2014; with LAMB, You et al. 2020).
    """
    if optim.scale == "none":
        return 1.0
    ratio = batch / optim.scale_batch
    return ratio if optim.scale == "linear" else math.sqrt(ratio)
