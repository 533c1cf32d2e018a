"""Those that take turns end to end: the step alone, the input alone, both as a run has them, and
the plain loop over ImageFolder."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import closing

import torch

from ...data.loaders.feed import on_device
from ...training.meters import Clock
from ...training.process import settings
from ..data.sides import Ours
from ..step import plain
from ..step.ours import Step
from ..step.peer import usual


class Alone:
    """The step on synthetic batches that lie on the device."""

    burst, ahead = 1, 2

    def __init__(self, step: Step) -> None:
        self.step, self.synthetic = step, step.batches

    def batches(self) -> Generator[int, None, None]:
        run = self.step.recipe.run
        with settings(run):
            self.step.batches = self.synthetic
            while True:
                self.step()
                yield run.batch


class Both:
    """The same step on the batches of a loader, as in `kdfuse train`."""

    burst = 1

    def __init__(self, step: Step, loader: Ours, device: torch.device) -> None:
        self.step, self.loader, self.device = step, loader, device
        self.ahead = 2 * loader.ahead  # what was prepared before the first step, and as much again
        self.waits: list[float] = []  # share of a block's time that went by until a batch was there

    def batches(self) -> Generator[int, None, None]:
        run, clock = self.step.recipe.run, Clock()
        with settings(run), closing(self.loader.taken()) as taken:
            self.step.batches = clock.count(on_device(taken, self.device))
            try:
                for number in itertools.count(1):
                    self.step()
                    if number == self.ahead:
                        clock.read()
                    yield run.batch
            finally:
                self.waits.append(clock.read()[1])


class Plain:
    """The loop that most repositories have, with the loader that they have."""

    def __init__(self, loop: plain.Loop, batch: int) -> None:
        self.loop, self.batch = loop, batch
        self.burst = self.ahead = max(1, loop.batches.loader.num_workers)
        self.waits: list[float] = []

    def batches(self) -> Generator[int, None, None]:
        loop, before = self.loop, (0.0, 0.0)
        with usual():
            try:
                for number in itertools.count(1):
                    loop()
                    if number == self.ahead:
                        before = loop.batches.waited, loop.spent
                    yield self.batch
            finally:
                waited, spent = loop.batches.waited - before[0], loop.spent - before[1]
                self.waits.append(waited / spent)
                loop.batches.close()
