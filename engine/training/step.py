"""One training step: everything that a batch changes, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..methods import Now, Terms
from .meters import Meters
from .optim import clip_gradients


class Step:
    """Forward, loss, backward, optimiser steps, averages of students, meters.

    What changes it beside its batch is in `now` alone (see scalars.py).
    """

    def __init__(
        self,
        model: Callable[..., tuple[Tensor, Terms]],  # the loss and the terms of a batch
        optimizers: Sequence[Optimizer],
        meters: Meters,
        averages: Callable[[Now], None] | None = None,  # called after the optimisers
        clip: float | None = None,  # largest norm of each optimiser's gradients
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.meters = meters
        self.averages = averages
        self.clip = clip

    def __call__(self, now: Now, *batch: Any) -> Terms:
        """Train on a batch, as the model takes it beside `now`, whose "step" is counted from 1.

        The model's terms.
        """
        loss, terms = self.model(now, *batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad()  # to None; FusedLAMB of apex takes no argument
        loss.backward()
        for optimizer in self.optimizers:
            if self.clip is not None:
                clip_gradients(optimizer, self.clip)
            optimizer.step()
        if self.averages is not None:
            self.averages(now)
        self.meters.add(now["step"], terms)
        return terms
