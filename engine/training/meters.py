"""Meters of training: sums kept on the device and read only for a log record, and the clock."""

import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..methods import Terms
from .ranks import Group

COUNTS = ("top1", "top5")
Item = TypeVar("Item")


class Diverged(RuntimeError):
    """A loss or an output is not a number, or infinite; the text says where."""


class Meters:
    """Sums of a window (since the last log record) and of the epoch so far, in float64."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.names: list[str] = []
        self.window = self.epoch = torch.zeros(0, dtype=torch.float64, device=group.device)
        # The first step whose loss was not finite; infinity while there is none.
        self.bad_step = torch.full((), torch.inf, dtype=torch.float64, device=group.device)

    def add(self, step: Tensor | float, terms: Terms) -> None:
        """Count one step's 0-dim terms, without waiting for the device."""
        if not self.names:
            self.names = ["steps", *terms]
            self.window = self.window.new_zeros(len(self.names))
            self.epoch = self.epoch.new_zeros(len(self.names))
        loss = terms["loss"].double()
        self.window += torch.stack([torch.ones_like(loss), *(terms[n].double() for n in terms)])
        now = self.bad_step.clamp(max=step)
        self.bad_step.copy_(torch.where(loss.isfinite(), self.bad_step, now))

    def check(self) -> None:
        """Raises Diverged where a loss of any process was not finite."""
        bad = self.group.min(self.bad_step).item()
        if bad != float("inf"):
            raise Diverged(
                f"the loss of step {int(bad)} is not finite: stopped, checkpoints before it are "
                "kept; lower optim.lr, add optim.warmup_epochs or look at the data"
            )

    def read(self) -> dict[str, float]:
        """Means of the window (top1 and top5 in percent); the window moves into the epoch."""
        self.check()
        window = self.group.sum(self.window.clone())
        self.epoch += window
        self.window.zero_()
        return self._means(window)

    def read_epoch(self) -> dict[str, float]:
        """Means over the epoch, after a read() of its last window; the next epoch starts at 0."""
        epoch = self.epoch.clone()
        self.epoch.zero_()
        return self._means(epoch)

    def _means(self, sums: Tensor) -> dict[str, float]:
        total = dict(zip(self.names, sums.tolist(), strict=True))
        steps, rows = total.pop("steps"), total.pop("rows")
        return {n: 100 * v / rows if n.endswith(COUNTS) else v / steps for n, v in total.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: of a window also each process's own sums, so that they are
        added up in the same order after a resume. All processes call it."""
        own = self.group.all(self.window.cpu())
        window = torch.stack(own).sum(0)
        return {"names": self.names, "window": window, "windows": own, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names = list(state["names"])
        self.epoch = state["epoch"].to(self.group.device)
        own = state.get("windows", [])  # the first of several processes had them all once
        if len(own) != self.group.world:
            rest = torch.zeros_like(state["window"])
            own = [state["window"], *[rest] * (self.group.world - 1)]
        self.window = own[self.group.rank].to(self.group.device)


class Clock:
    """How fast batches go through, and the share of the time spent waiting for them."""

    def __init__(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def count(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The same batches, counted, with the time that each took to come."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.steps += 1
            yield batch

    def read(self) -> tuple[float, float]:
        """Steps a second and the waiting share (0..1) since the last reading."""
        passed = time.perf_counter() - self.started
        speed, share = self.steps / passed, self.waited / passed
        self.started, self.waited, self.steps = self.started + passed, 0.0, 0
        return speed, share
