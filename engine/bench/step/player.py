"""Something that takes its turn in a run: blocks of steps, each timed as one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ....kernels.bench.timing import quantile
from . import gauges

BLOCKS = 8  # timed in turn; a median of fewer does not outlive a stall of the machine
LONG = 0.1  # seconds of a step that does not feel whose data the caches held before it


@dataclass
class Player:
    """Something that takes its turn: a block of steps, timed as one."""

    step: Callable[[], Any]
    process: Callable[[], AbstractContextManager[Any]]
    guarded: bool  # whether a wait for the device is an error
    steps: int = 1  # of a block
    alone: float = 0.0  # seconds of a step, about
    seconds: list[float] = field(default_factory=list)  # of a step, one for each block

    def warm_up(self, device: torch.device, seconds: float) -> None:
        """Take the first steps, and choose a block's so that `BLOCKS` last that long."""
        with self.process():
            self.step()
        self.block(device)
        self.alone = self.seconds.pop()
        self.steps = max(1, round(seconds / BLOCKS / self.alone))

    def block(self, device: torch.device) -> None:
        with self.process():
            if self.alone < LONG:
                self.step()
            began = now(device)
            with gauges.no_waiting(device) if self.guarded else nullcontext():
                for _ in range(self.steps):
                    self.step()
            self.seconds.append((now(device) - began) / self.steps)

    @property
    def median(self) -> float:
        return quantile(self.seconds, 0.5)


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
