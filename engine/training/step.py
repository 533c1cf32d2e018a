"""One training step: everything that a batch changes, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..methods import Now, Terms
from .ema import AVERAGED
from .guard import Guard
from .meters import COUNTS, Meters
from .optim import clip_gradients

SUMS = (*COUNTS, "rows")  # endings of terms that are no means over the rows


class Step:
    """Forward, loss, backward, optimiser steps, averages of students, meters.

    What changes it beside its batch is in `now` alone (see scalars.py).
    """

    def __init__(
        self,
        model: Callable[..., tuple[Tensor, Terms]],  # the loss and the terms of a batch
        optimizers: Sequence[Optimizer],
        meters: Meters,
        averages: Callable[[Tensor], None] | None = None,  # called with their share, at the end
        clip: float | None = None,  # largest norm of each optimiser's gradients
        parts: int = 1,  # of a batch, each with its own forward and backward pass
        weight: float = 1.0,  # of this process's mean in that of all, times the number of processes
        guard: Guard | None = None,  # which skips a step that is not finite
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.meters = meters
        self.averages = averages
        self.clip = clip
        self.parts, self.weight = parts, weight
        self.guard = guard

    def __call__(self, now: Now, *batch: Any) -> Terms:
        """Train on a batch, as the model takes it beside `now`, whose "step" is counted from 1.

        The model's terms. To be taken in several parts, a batch is of tensors with a row for each
        image; the gradients are then the mean of the parts'.
        """
        split = (
            [batch] if self.parts == 1 else zip(*(x.chunk(self.parts) for x in batch), strict=True)
        )
        found: list[Terms] = []
        guard = self.guard
        if guard is not None:
            guard.begin(*batch)
        for part in split:
            with self._alone(len(found) + 1 < self.parts):
                loss, terms = self.model(now, *part)
                if not found:
                    for optimizer in self.optimizers:
                        optimizer.zero_grad()  # to None; FusedLAMB of apex takes no argument
                share = self.weight / self.parts
                seed = None if guard is None else guard.seed(loss)
                (loss if share == 1 else loss * share).backward(seed)
            found.append(terms)
        if self.parts > 1:
            self._check_reached()
        bad = None if guard is None else guard.decide()
        for optimizer in self.optimizers:
            if self.clip is not None:
                clip_gradients(optimizer, self.clip)
            optimizer.step()
        if guard is not None and bad is not None:
            guard.undo(bad)
        if self.averages is not None and AVERAGED in now:
            taken = now[AVERAGED]
            self.averages(taken if bad is None else taken.masked_fill(bad, 0.0))
        terms = joined(found)
        self.meters.add(now["step"], self._weighed(terms), bad)
        return terms

    def _check_reached(self) -> None:
        """Of several processes, else their next step would wait for gradients that never come."""
        if not isinstance(self.model, DistributedDataParallel):
            return
        trained = self.model.module.named_parameters()
        if unreached := [name for name, p in trained if p.requires_grad and p.grad is None]:
            raise ValueError(
                f"run.accumulate={self.parts}: with several processes every parameter needs a "
                f"gradient, and the loss reaches none of {', '.join(unreached)}; set "
                "run.accumulate=1 or another student"
            )

    def _weighed(self, terms: Terms) -> Terms:
        """Such that their mean over the processes is the one over all images."""
        if self.weight == 1:
            return terms
        return {n: v if n.endswith(SUMS) else v * self.weight for n, v in terms.items()}

    def _alone(self, alone: bool) -> AbstractContextManager[Any]:
        """Within, gradients stay with this process until a later backward pass."""
        if alone and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()


def joined(parts: Sequence[Terms]) -> Terms:
    """The terms of a batch from those of its equal parts: sums of counts, means of the rest."""
    if len(parts) == 1:
        return parts[0]
    stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {
        name: values.sum(0) if name.endswith(SUMS) else values.mean(0)
        for name, values in stacked.items()
    }
