"""One training step: everything that a batch changes, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .optim import clip_gradients


class Step:
    """Forward, loss, backward, optimiser steps, and the averages of students if there are any."""

    def __init__(
        self,
        model: Callable[..., tuple[Tensor, dict[str, Tensor]]],  # the loss and the terms of a batch
        optimizers: Sequence[Optimizer],
        averages: Callable[[], None] | None = None,  # called after the optimisers
        clip: float | None = None,  # largest norm of each optimiser's gradients
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.averages = averages
        self.clip = clip

    def __call__(self, *batch: Any) -> dict[str, Tensor]:
        """Train on a batch, as the model takes it; the model's terms."""
        loss, terms = self.model(*batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            if self.clip is not None:
                clip_gradients(optimizer, self.clip)
            optimizer.step()
        if self.averages is not None:
            self.averages()
        return terms
