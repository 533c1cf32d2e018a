"""The loader without DALI: PIL decodes and torchvision crops and resizes, in a pool of threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..batch import Batch
from ..images import UnreadableError
from ..plan import Plan
from ..schedule import Schedule, Task
from .decoding import Mode, decoding
from .finish import finish

Picture = TypeVar("Picture", Image.Image, Tensor)
Begun = TypeVar("Begun")
Pending = tuple[Task, Begun, "list[Future[Any]]"]


def render(image: Picture, plan: Plan, i: int, size: int) -> Picture:
    """The crop and flip of row i done to its decoded image, RGB or (3, height, width) uint8."""
    top, left, height, width = plan.box[i].tolist()
    scaled, (y, x) = plan.scaled[i].tolist(), plan.window[i].tolist()
    image = F.crop(image, top, left, height, width)
    if [height, width] != scaled:
        image = F.resize(image, scaled, antialias=True)
    if scaled != [size, size]:
        image = F.crop(image, y, x, size, size)
    if plan.flip[i]:
        image = F.horizontal_flip(image)
    return image


def in_order(
    begin: Callable[[int], Pending[Begun]],
    finish: Callable[[Task, Begun, list[Future[Any]]], Batch],
    steps: range,
    ahead: int,
) -> Iterator[Batch]:
    """The batches of these steps; so many are begun while one is in use, and their jobs are
    cancelled where the rest is not asked for.
    """
    left, pending = iter(steps), deque[Pending[Begun]]()
    try:
        pending.extend(begin(step) for step in islice(left, ahead))
        while pending:
            batch = finish(*pending[0])
            pending.popleft()
            pending.extend(begin(step) for step in islice(left, 1))
            yield batch
    finally:
        for _, _, jobs in pending:
            for job in jobs:
                job.cancel()


class VisionLoader:
    """The batches of a schedule, exactly as planned.

    `workers` threads decode; `prefetch` batches are under way while one is in use. Neither changes
    what comes out. With a GPU as `device`, batches lie in pinned memory.
    """

    name = "torchvision"
    mode: Mode = "cpu"

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self._schedule = schedule
        self._manifest, self._data = schedule.manifest, schedule.data
        self.decode = decoding(self._data, self.name, device).text
        self._pin = device.type == "cuda"
        self._pool = ThreadPoolExecutor(self._data.workers, thread_name_prefix="kdfuse-decode")
        self.steps, self.quarantine = schedule.steps, schedule.quarantine
        self.names = schedule.names

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start`; nothing before it is read."""
        steps = self._schedule.tasks_from(start)
        return in_order(partial(self._begin, epoch), self._finish, steps, self._data.prefetch)

    def close(self) -> None:
        """Ends the threads; an epoch in progress cannot go on."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, epoch: int, step: int) -> Pending[Tensor]:
        task, size = self._schedule.task(epoch, step), self._data.size
        shape = (len(task.plan.index), size, size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
        out = images.numpy()
        jobs = [self._pool.submit(self._fill, task.plan, i, out) for i in range(len(out))]
        return task, images, jobs

    def _finish(self, task: Task, images: Tensor, jobs: list[Future[str | None]]) -> Batch:
        """Waits for a batch; where a file is bad, plans its step anew and does the changed rows."""
        faults = {i: why for i, job in enumerate(jobs) if (why := job.result()) is not None}
        while faults:
            for i, why in faults.items():
                self.quarantine.add(int(task.plan.index[i]), why)
            before, task = task.plan.index, self._schedule.task(task.epoch, task.step)
            again = {
                int(i): self._pool.submit(self._fill, task.plan, int(i), images.numpy())
                for i in np.flatnonzero(task.plan.index != before)
            }
            faults = {i: why for i, job in again.items() if (why := job.result()) is not None}
        return self._schedule.pack(task, images)

    def _fill(self, plan: Plan, i: int, out: NDArray[np.uint8]) -> str | None:
        """Image i of the plan into out[i]; why its file is bad, or None."""
        try:
            image = self._manifest.read(int(plan.index[i]))
        except UnreadableError as error:
            return str(error)
        out[i] = np.asarray(render(image, plan, i, self._data.size))
        finish(plan, i, out[i])
        return None
