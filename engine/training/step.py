"""One training step: everything that a batch changes, without waiting for the device."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods import Terms
from .learner import Branch
from .networks import prefix
from .optim import clip_gradients


class Step:
    """Forward, loss, backward, optimiser steps, and the average of the student if there is one."""

    def __init__(
        self,
        model: nn.Module,  # a Distiller, or what wraps it for many processes
        branches: dict[str, Branch],  # the distiller's
        optimizers: Sequence[Optimizer],
        averages: Sequence[Callable[[], None]] = (),  # called after the optimisers
        clip: float | None = None,  # largest norm of each optimiser's gradients
    ) -> None:
        self.model = model
        self.branches = branches
        self.optimizers = optimizers
        self.averages = averages
        self.clip = clip

    def __call__(self, images: Tensor, target: Tensor, index: Tensor, epoch: float) -> Terms:
        """Train on images (N, 3, H, W) of 0..255, uint8 or float32, on the device.

        `target` are their labels (N,) int64, or class probabilities (N, C) where all methods take
        them; `index` (N,) int64 their numbers in the training set; `epoch` is 0-based and
        fractional. Returns the losses and the methods' terms, detached; the branches beside the
        main one with their name before a term's.
        """
        losses: list[Tensor] = []
        found: Terms = {}
        for name, out in self.model(images, target, index).items():
            loss, terms = self.branches[name].loss(out, target, epoch)
            terms = {"loss": loss.detach(), **terms}
            if losses:
                del terms["rows"]  # the main branch's rows are everybody's
            found |= {f"{prefix(name)}{term}": value for term, value in terms.items()}
            losses.append(loss)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        # The branches share no parameter, so that the sum trains each as if it were alone.
        sum(losses[1:], start=losses[0]).backward()
        for optimizer in self.optimizers:
            if self.clip is not None:
                clip_gradients(optimizer, self.clip)
            optimizer.step()
        for average in self.averages:
            average()
        return found
