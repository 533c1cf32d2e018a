"""The loader for small sets: all images are decoded once, then cropped where the run computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ...recipe.schema import Data
from ..batch import CPU, Batch
from ..images import UnreadableError
from ..manifest import Manifest
from ..plan import Plan, eval_plan
from ..schedule import Schedule
from .vision import render


class ResidentLoader:
    """Batches of `batch` images for process `rank` of `world`, exactly as planned, on `device`.

    Random crops need images of one size: ValueError where they differ.
    """

    name = "resident"

    def __init__(
        self,
        manifest: Manifest,
        data: Data,
        batch: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        train: bool,
        device: torch.device = CPU,
    ) -> None:
        self._schedule = Schedule(
            manifest, data, batch, seed=seed, rank=rank, world=world, train=train
        )
        self._manifest, self._data, self._device = manifest, data, device
        self._images = self._decode_all().to(device)  # (n, H, W, 3) uint8
        self.steps = self._schedule.steps
        self.bad = self._schedule.quarantine.bad

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start`."""
        return self._batches(epoch, self._schedule.tasks_from(start))

    def close(self) -> None:
        """Frees the images; an epoch in progress cannot go on."""
        self._images = self._images.new_empty(0)

    def _batches(self, epoch: int, steps: range) -> Iterator[Batch]:
        resize = self._schedule.view == "random_resized_crop"
        for step in steps:
            task = self._schedule.task(epoch, step)
            images = self._resized(task.plan) if resize else self._gathered(task.plan)
            yield self._schedule.pack(task, images)

    def _decode_all(self) -> Tensor:
        """Every image, zero where unreadable; with a fixed view (no crop) what it shows of them."""
        sizes, view = self._manifest.sizes, self._schedule.view
        readable = sizes[[row not in self._schedule.quarantine.bad for row in range(len(sizes))]]
        pad, fixed = self._data.padding if view == "pad_crop" else 0, view == "none"
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
        return render(image, plan, 0, self._data.size)

    def _gathered(self, plan: Plan) -> Tensor:
        """Windows of one size, (B, size, size, 3), read by index; a flip reads backwards."""
        side = np.arange(self._data.size)
        rows = np.zeros_like(plan.index)[:, None] + side  # (B, size)
        columns = np.where(plan.flip[:, None], side[::-1], side)
        if self._schedule.view == "pad_crop":
            rows = rows + plan.box[:, :1] + self._data.padding
            columns = columns + plan.box[:, 1:2] + self._data.padding
        index, y, x = (torch.from_numpy(a).to(self._device) for a in (plan.index, rows, columns))
        return self._images[index[:, None, None], y[:, :, None], x[:, None, :]]

    def _resized(self, plan: Plan) -> Tensor:
        """Boxes of any size, each resized to (size, size)."""
        size = self._data.size
        out = self._images.new_empty(len(plan.index), size, size, 3)
        for i, (row, box) in enumerate(zip(plan.index.tolist(), plan.box.tolist(), strict=True)):
            image = F.resized_crop(
                self._images[row].permute(2, 0, 1), *box, [size, size], antialias=True
            )
            out[i] = (F.horizontal_flip(image) if plan.flip[i] else image).permute(1, 2, 0)
        return out
