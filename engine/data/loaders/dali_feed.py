"""What DALI is fed: the files of each step and the parts of them to decode."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contents import Encoded, Files, Shards
from ..manifest import Manifest
from ..plan import Plan
from ..quarantine import BadImagesError
from ..schedule import Schedule, Task

Fetched = NDArray[np.uint8] | str
Inputs = tuple["list[Fetched] | NDArray[Any]", ...]


class Reader:
    """Fetches rows. DALI reads files in its own threads; tars are read here, in as many."""

    def __init__(self, manifest: Manifest, threads: int) -> None:
        self.packed = isinstance(manifest.content, Shards)
        self._fetch = partial(fetch, manifest)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kdfuse-read")

    def __call__(self, rows: list[int]) -> list[Fetched]:
        return list(self._pool.map(self._fetch, rows) if self.packed else map(self._fetch, rows))

    def close(self) -> None:
        self._pool.shutdown()


class Feed:
    """Gives the pipeline the inputs of each step, and keeps the tasks not yet delivered.

    It goes on over the ends of epochs, so that DALI's prefetching does too.
    """

    def __init__(
        self,
        schedule: Schedule,
        epoch: int,
        step: int,
        fetch: Callable[[list[int]], list[Fetched]],
        *,
        resizes: bool,
    ) -> None:
        """`resizes`: DALI does, so it is given the whole plan, else the boxes alone."""
        self.schedule, self.following = schedule, (epoch, step)
        self.fetch, self.resizes = fetch, resizes
        self.ahead: deque[Task] = deque()
        self.failure: BadImagesError | None = None  # of the step behind those ahead

    @property
    def due(self) -> tuple[int, int]:
        """The epoch and step of what the pipeline delivers next."""
        return (self.ahead[0].epoch, self.ahead[0].step) if self.ahead else self.following

    def __call__(self) -> Inputs:
        """StopIteration, which ends the prefetching, where too many images are bad.

        That is an error of the step asked for, which no one may ever train on: it may lie behind a
        run's last.
        """
        try:
            task, files = self._planned(*self.following)
        except BadImagesError as error:
            self.failure = error
            raise StopIteration from error
        self.ahead.append(task)
        self.following = self.schedule.after(*self.following)
        return inputs(files, task.plan, resizes=self.resizes)

    def _planned(self, epoch: int, step: int) -> tuple[Task, list[Fetched]]:
        while True:
            task = self.schedule.task(epoch, step)
            rows = task.plan.index.tolist()
            fetched = dict(zip(rows, self.fetch(rows), strict=True))
            faults = {row: why for row, why in fetched.items() if isinstance(why, str)}
            if not faults:
                return task, [fetched[row] for row in rows]
            for row, why in faults.items():
                self.schedule.quarantine.add(row, why)


def inputs(files: list[Fetched], plan: Plan, *, resizes: bool) -> Inputs:
    """What the graph is fed for the rows of a plan."""
    if not resizes:
        return files, plan.box
    return files, plan.box, plan.scaled.astype(np.float32), plan.window, plan.flip.astype(np.int32)


def fetch(manifest: Manifest, row: int) -> Fetched:
    """The path of a row's file or the bytes of its tar's member; a text: why it has none.

    Whether a file is the indexed one is asked of its bytes once they are read: a stat each here
    would hold up the training loop.
    """
    content = manifest.content
    assert isinstance(content, Encoded)
    if isinstance(content, Files):
        return np.frombuffer(os.fsencode(content.paths[row]), np.uint8)
    changed = content.changed(row)
    if changed is not None:
        return changed
    try:
        with content.open(row) as file:
            return np.frombuffer(file.read(), np.uint8)
    except OSError as error:
        return error.strerror or str(error)
