"""What DALI is fed: the files of each step and the parts of them to decode."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..contents import Encoded, Files, Shards
from ..manifest import Manifest
from ..schedule import Schedule, Task

Fetched = NDArray[np.uint8] | str
Inputs = tuple["list[Fetched]", NDArray[np.int32]]


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
    """Gives the pipeline the inputs of each step, and keeps the tasks not yet delivered."""

    def __init__(
        self,
        schedule: Schedule,
        epoch: int,
        steps: range,
        fetch: Callable[[list[int]], list[Fetched]],
    ) -> None:
        self.schedule, self.epoch, self.steps = schedule, epoch, iter(steps)
        self.fetch = fetch
        self.ahead: deque[Task] = deque()

    def __call__(self) -> Inputs:
        """StopIteration after the last step ends the pipeline's prefetching."""
        step = next(self.steps)
        # A crop may miss the damage of a cut file, so DALI's errors alone would depend on the crop.
        while True:
            task = self.schedule.task(self.epoch, step)
            rows = task.plan.index.tolist()
            fetched = dict(zip(rows, self.fetch(rows), strict=True))
            faults = {row: why for row, why in fetched.items() if isinstance(why, str)}
            if not faults:
                break
            for row, why in faults.items():
                self.schedule.quarantine.add(row, why)
        self.ahead.append(task)
        return [fetched[row] for row in rows], task.plan.box


def fetch(manifest: Manifest, row: int) -> Fetched:
    """The path of a row's file or the bytes of its tar's member; a text: why it has none."""
    content = manifest.content
    assert isinstance(content, Encoded)
    changed = content.changed(row)
    if changed is not None:
        return changed
    if isinstance(content, Files):
        return np.frombuffer(os.fsencode(content.paths[row]), np.uint8)
    try:
        with content.open(row) as file:
            return np.frombuffer(file.read(), np.uint8)
    except OSError as error:
        return error.strerror or str(error)
