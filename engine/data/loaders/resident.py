"""The loader for small sets: all images are decoded once, then cropped where the run computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..batch import Batch
from ..images import UnreadableError
from ..plan import eval_plan
from ..schedule import Schedule
from .decoding import Mode, decoding
from .ondevice import crop, resized_crop
from .vision import render


class ResidentLoader:
    """The batches of a schedule, exactly as planned, on `device`.

    Random crops need images of one size: ValueError where they differ, and where crops are to be
    changed further.
    """

    name = "resident"
    mode: Mode = "cpu"

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self._schedule = schedule
        self._manifest, self._data = schedule.manifest, schedule.data
        if schedule.train and self._data.after_crop:
            raise ValueError(
                f"data.loader=resident cannot do {' and '.join(self._data.after_crop)}; use auto"
            )
        self.decode = decoding(self._data, self.name, device).text
        self._border = self._data.padding if schedule.view == "pad_crop" else 0
        self._images = self._decode_all().to(device)  # (n, H, W, 3) uint8
        self.steps, self.bad = schedule.steps, schedule.quarantine.bad

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start`."""
        return self._batches(epoch, self._schedule.tasks_from(start))

    def close(self) -> None:
        """Frees the images; an epoch in progress cannot go on."""
        self._images = self._images.new_empty(0)

    def _batches(self, epoch: int, steps: range) -> Iterator[Batch]:
        resize, size = self._schedule.view == "random_resized_crop", self._data.size
        for step in steps:
            task = self._schedule.task(epoch, step)
            if resize:
                images = resized_crop(self._images, task.plan, size)
            else:
                images = crop(self._images, task.plan, self._border, size)
            yield self._schedule.pack(task, images)

    def _decode_all(self) -> Tensor:
        """Every image, zero where unreadable; with a fixed view (no crop) what it shows of them."""
        sizes, view = self._manifest.sizes, self._schedule.view
        readable = sizes[[row not in self._schedule.quarantine.bad for row in range(len(sizes))]]
        pad, fixed = self._border, view == "none"
        height, width = (self._data.size,) * 2 if fixed else readable[0].tolist()
        if not fixed and (readable != readable[0]).any():
            raise ValueError(
                f"data.loader=resident with data.augment={view} needs images of one size, found "
                f"{height} x {width} and others; use data.loader=auto"
            )
        out = np.zeros((len(sizes), height + 2 * pad, width + 2 * pad, 3), np.uint8)

        def read(row: int) -> str | None:
            if row in self._manifest.bad:
                return None
            try:
                image = self._manifest.read(row)
            except UnreadableError as error:
                return str(error)
            inner = slice(pad, pad + height), slice(pad, pad + width)
            out[row][inner] = self._whole(image, row) if fixed else np.asarray(image)
            return None

        with ThreadPoolExecutor(self._data.workers) as pool:
            for row, why in enumerate(pool.map(read, range(len(sizes)))):
                if why is not None:
                    self._schedule.quarantine.add(row, why)
        return torch.from_numpy(out)

    def _whole(self, image: Image.Image, row: int) -> np.ndarray:
        plan = eval_plan(self._data, self._manifest.sizes, np.array([row]))
        return np.asarray(render(image, plan, 0, self._data.size))
