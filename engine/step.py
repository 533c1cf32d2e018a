"""One training step: everything that a batch changes, without waiting for the device."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from .methods import Method, Terms


class Step:
    """Forward, loss, backward, optimiser steps, and the average of the student if there is one."""

    def __init__(
        self,
        model: nn.Module,  # a Distiller, or what wraps it for many processes
        method: Method,
        optimizers: Sequence[Optimizer],
        average: Callable[[], None] | None = None,  # called after the optimisers
    ) -> None:
        self.model = model
        self.method = method
        self.optimizers = optimizers
        self.average = average

    def __call__(self, images: Tensor, target: Tensor, epoch: float) -> Terms:
        """Train on uint8 images (N, 3, H, W) with int64 labels (N,), both on the device.

        `epoch` is 0-based and fractional. Returns the loss and the method's terms, detached.
        """
        loss, terms = self.method.loss(self.model(images), target, epoch)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            self.average()
        return {"loss": loss.detach(), **terms}
