"""A step whose loss or gradients are not finite changes nothing: decided and done on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..recipe.optim import Optim


@runtime_checkable
class Undoes(Protocol):
    """A module that puts its own buffers back, since a copy of them all would be too large."""

    def mark(self, *batch: Any) -> None:
        """Keep what a step on this batch, as the model takes it, will overwrite."""

    def undo(self, bad: Tensor) -> None:
        """Put it back where `bad` (0-dim, bool) is true."""


class Guard:
    """Whether the step at hand counts, for its optimisers and the buffers of its modules.

    It does unless an element of a gradient is NaN or infinite. A loss that is not makes them so
    (`seed`), and what one process finds all processes find, once their gradients are averaged:
    they decide alike. An optimiser of torch's, fused, reads `bad` as its `found_inf`.
    """

    def __init__(self, optimizers: Sequence[Optimizer], modules: Iterable[nn.Module]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        device = self._parameters[0].device
        self._one = torch.ones((), device=device)
        self._bad = torch.zeros((), device=device)  # 1: the step does not count
        for optimizer in optimizers:
            cast(Any, optimizer).found_inf = self._bad
        found = list(modules)
        self._own = [module for module in found if isinstance(module, Undoes)]
        others = [module for module in found if not isinstance(module, Undoes)]
        buffers = {id(b): b for module in others for b in module.buffers(recurse=False)}
        self._buffers = [raw(b) for b in buffers.values() if writable(b)]
        size = sum(map(len, self._buffers))
        self._before = torch.empty(size, dtype=torch.uint8, device=device)
        self._after = torch.empty_like(self._before)
        self._parts = list(self._after.split([len(b) for b in self._buffers]))

    def begin(self, *batch: Any) -> None:
        """Before the forward pass of a whole batch: keep what it will overwrite."""
        if self._buffers:
            torch.cat(self._buffers, out=self._before)
        for module in self._own:
            module.mark(*batch[:3])  # not what was recorded

    def seed(self, loss: Tensor) -> Tensor:
        """What the backward pass of a loss (0-dim) begins with: 1; NaN if that is not finite."""
        return torch.add(self._one, loss.detach(), alpha=0)

    @torch.no_grad()
    def decide(self) -> Tensor:
        """After the backward pass, before the optimisers: True (0-dim) for a step not to count."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._parameters:
            if parameter.grad is not None:
                by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        self._bad.zero_()
        for gradients in by_type.values():
            # As torch's GradScaler looks for them; a product with 1 changes nothing.
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._bad, self._one)
        return self._bad > 0

    @torch.no_grad()
    def undo(self, bad: Tensor) -> None:
        """Put the buffers back if the step does not count."""
        if self._buffers:
            torch.cat(self._buffers, out=self._after)
            torch.where(bad, self._before, self._after, out=self._after)
            torch._foreach_copy_(self._buffers, self._parts)
        for module in self._own:
            module.undo(bad)


def guard_of(optim: Optim, optimizers: Sequence[Optimizer], networks: nn.Module) -> Guard | None:
    """The guard of a run's steps; None where none is skipped."""
    return Guard(optimizers, networks.modules()) if optim.skips else None


def writable(buffer: Tensor) -> bool:
    """Whether a forward pass may write to it: not to one that is expanded."""
    return all(n == 1 or step > 0 for n, step in zip(buffer.shape, buffer.stride(), strict=True))


def raw(buffer: Tensor) -> Tensor:
    """The bytes of a dense tensor in the order of its memory, which they share; uint8, 1-dim."""
    order = sorted(range(buffer.ndim), key=buffer.stride, reverse=True)
    return buffer.permute(order).view(-1).view(torch.uint8)
