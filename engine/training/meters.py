"""Meters of training: sums kept on the device and read only for a log record, and the clock."""

import math
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..methods import Terms
from .faults import Faults, Row
from .ranks import Group

COUNTS = ("top1", "top5")
Item = TypeVar("Item")


class Diverged(RuntimeError):
    """A loss or an output is not a number, or infinite; the text says where."""


class NotFinite(Diverged):
    """More steps in a row than may be have a loss or gradients that are not finite."""

    def __init__(self, row: Row, skipped: bool) -> None:
        """`skipped`: they changed nothing; else the first of them is in the weights."""
        self.row = row
        text = f"the loss of step {row.first} is not finite ({row.terms_in_words()})"
        if skipped:
            text = f"{row.steps} steps in a row were skipped, {row.in_words()}"
        super().__init__(text)


class Meters:
    """Sums of a window (since the last log record) and of the epoch so far, in float64.

    Of the steps that count, where a step may be skipped (`limit` above 0, see Faults).
    """

    def __init__(self, group: Group, limit: int = 0) -> None:
        self.group = group
        self.faults = Faults(group, limit)
        self.names: list[str] = []
        self.window = self.epoch = torch.zeros(0, dtype=torch.float64, device=group.device)

    def add(self, step: Tensor, terms: Terms, bad: Tensor | None = None) -> None:
        """Count one step's 0-dim terms, without waiting for the device.

        `bad` (0-dim, bool): it was skipped; None: nobody looked, the loss alone says.
        """
        if not self.names:
            self.names = ["steps", *terms]
            self.window = self.window.new_zeros(len(self.names))
            self.epoch = self.epoch.new_zeros(len(self.names))
        if bad is None:
            bad = terms["loss"].isfinite().logical_not()
        given = [value.double() for value in terms.values()]
        values = torch.stack([torch.ones_like(given[0]), *given])
        self.faults.add(step, bad, values)
        self.window += values.masked_fill_(bad, 0.0)

    def check(self) -> None:
        """Raises NotFinite, in all processes, where too many steps in a row did not count."""
        if self.faults.too_many():
            raise NotFinite(self.faults.last(self.names), self.faults.limit > 0)

    def read(self) -> dict[str, float]:
        """Means of the window (top1 and top5 in percent); the window moves into the epoch.

        "skipped" is among them where steps were, of which the means know nothing. Raises NotFinite.
        """
        self.check()
        window = self.group.sum(self.window.clone())
        self.epoch += window
        self.window.zero_()
        skipped = self.faults.read()
        return self._means(window) | ({"skipped": skipped} if skipped else {})

    def read_epoch(self) -> dict[str, float]:
        """Means over the epoch, after a read() of its last window; the next epoch starts at 0."""
        epoch = self.epoch.clone()
        self.epoch.zero_()
        return self._means(epoch)

    def _means(self, sums: Tensor) -> dict[str, float]:
        total = dict(zip(self.names, sums.tolist(), strict=True))
        steps, rows = total.pop("steps") or math.nan, total.pop("rows") or math.nan
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
