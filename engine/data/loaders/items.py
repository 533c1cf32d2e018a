"""The loader of data set objects whose items are tensors: it fetches them in the plan's order."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..batch import Batch
from ..items import ItemError, Tensors
from ..plan import ITEM, key, keys
from ..schedule import Schedule, Task
from .decoding import Mode, decoding


class ItemsLoader:
    """The batches of a schedule, of images as the items have them.

    `data.workers` processes call the object's __getitem__, each with the random number generators
    of Python, NumPy and PyTorch seeded by (seed, epoch, position): augmentation that draws from
    those is the same in each run, whatever the workers, and where a run goes on in an epoch.
    """

    name = "items"
    mode: Mode = "cpu"

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        """Raises ValueError where the recipe would crop, flip or change the images."""
        data = schedule.data
        asked = [f"data.augment={data.augment}"] if data.augment != "none" else []
        asked += ["data.flip=true"] if data.flip else []
        asked += data.after_crop
        if schedule.train and asked:
            raise ValueError(
                f"{' and '.join(asked)}: the images of {schedule.manifest.name(0)} are tensors, "
                "which are taken as they are; leave that out, or give PIL images or paths"
            )
        assert isinstance(schedule.manifest.content, Tensors)
        self._schedule, self._content = schedule, schedule.manifest.content
        self.decode = decoding(data, self.name, device).text
        self.steps, self.quarantine = schedule.steps, schedule.quarantine
        self.names = schedule.names
        self._keys = _Keys(schedule)
        self._images: DataLoader[Tensor | ItemError] | None = DataLoader(
            _Keyed(self._content),  # type: ignore[arg-type]
            batch_sampler=self._keys,
            num_workers=data.workers,
            prefetch_factor=data.prefetch,
            persistent_workers=True,
            collate_fn=_stacked,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or each epoch would draw from the run's own
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start`; nothing before it is read."""
        if self._images is None:
            raise RuntimeError("the loader is closed")
        tasks = [self._schedule.task(epoch, step) for step in self._schedule.tasks_from(start)]
        self._keys.tasks = tasks
        for task, made in zip(tasks, self._images, strict=True):
            if isinstance(made, ItemError):
                raise made from RuntimeError(made.origin)
            last = made.contiguous(memory_format=torch.channels_last)
            yield self._schedule.pack(task, last.permute(0, 2, 3, 1))

    def close(self) -> None:
        """Ends the processes; an epoch in progress cannot go on."""
        self._images = None


class _Keys:
    """Row and seed of each image of the tasks of an epoch, a list a batch."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.tasks: list[Task] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for task in self.tasks:
            positions = self._schedule.positions(task.step)
            stream = key(self._schedule.seed, task.epoch, ITEM, int(self._schedule.train))
            seeds = keys(stream, positions).astype(np.uint64) >> np.uint64(32)
            yield list(zip(task.plan.index.tolist(), seeds.tolist(), strict=True))


class _Keyed:
    def __init__(self, content: Tensors) -> None:
        self._content = content

    def __len__(self) -> int:
        return len(self._content.target)

    def __getitem__(self, row_and_seed: tuple[int, int]) -> Tensor | ItemError:
        """The image, or what is wrong with it; raised here, its text would become a traceback."""
        try:
            return self._content.item(*row_and_seed)
        except ItemError as error:
            error.origin = traceback.format_exc()
            return error


def _stacked(items: list[Tensor | ItemError]) -> Tensor | ItemError:
    images = [item for item in items if isinstance(item, Tensor)]
    broken = [item for item in items if isinstance(item, ItemError)]
    return broken[0] if broken else torch.stack(images)
