"""The loader for small sets: all images are decoded once, then cropped where the run computes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...recipe.data import Data
from ..batch import Batch
from ..images import UnreadableError
from ..manifest import Manifest
from ..plan import eval_plan
from ..schedule import Schedule
from .decoding import Mode, decoding
from .ondevice import crop
from .resize import resized_crop
from .vision import render

# Pixels that `auto` lets a loader decode before the first step, and keep: each process of a run has
# its own, beside the networks. The 50,000 training images of CIFAR are 147 MiB.
AUTO_BYTES = 512 * 2**20
PATIENCE = 3.0  # seconds of decoding before it is told


class ResidentLoader:
    """The batches of a schedule, exactly as planned, on `device`.

    It decodes all images when it is made, in `data.workers` threads, and every process of a run
    decodes and holds the whole set. Random crops need images of one size: ValueError where they
    differ, and where crops are to be changed further.
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
        self._border = _border(self._data, schedule.view)
        self.steps, self.quarantine = schedule.steps, schedule.quarantine
        self._images = self._decode_all().to(device)  # (n, H, W, 3) uint8
        self.names = schedule.names

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
        manifest, view, pad = self._manifest, self._schedule.view, self._border
        frame = _frame(manifest, self._data, view)
        if frame is None:
            height, width = _readable(manifest)[0].tolist()
            raise ValueError(
                f"data.loader=resident with data.augment={view} needs images of one size, found "
                f"{height} x {width} and others; use data.loader=auto"
            )
        rows, (height, width) = len(manifest.target), frame
        if view == "random_resized_crop":  # columns are contiguous, as it takes them first
            out = np.zeros((rows, width, height, 3), np.uint8).swapaxes(1, 2)
        else:
            out = np.zeros((rows, height, width, 3), np.uint8)
        inner = slice(pad, height - pad), slice(pad, width - pad)

        def read(row: int) -> str | None:
            if row in manifest.bad:
                return None
            try:
                image = manifest.read(row)
            except UnreadableError as error:
                return str(error)
            out[row][inner] = self._whole(image, row) if view == "none" else np.asarray(image)
            return None

        first = self._schedule.part.start == 0
        due = time.monotonic() + PATIENCE if first else math.inf
        pool = ThreadPoolExecutor(self._data.workers, thread_name_prefix="kdfuse-decode")
        try:
            for row, why in enumerate(pool.map(read, range(rows))):
                if why is not None:
                    self.quarantine.add(row, why, warn=first)
                if time.monotonic() > due:
                    text = f"decoding {rows} images, which then stay in memory: {row + 1} are done"
                    print(text, file=sys.stderr, flush=True)
                    due = math.inf
        finally:
            pool.shutdown(cancel_futures=True)
        return torch.from_numpy(out)

    def _whole(self, image: Image.Image, row: int) -> np.ndarray:
        plan = eval_plan(self._data, self._manifest.sizes, np.array([row]))
        return np.asarray(render(image, plan, 0, self._data.size))


def suits(manifest: Manifest, data: Data, train: bool) -> bool:
    """Whether `auto` is this loader: it can do what is asked, and the set is small.

    Neither what is decoded nor what is kept may be above `AUTO_BYTES`; a run has one such loader
    for training and one for evaluation.
    """
    view = data.augment if train else "none"
    frame = _frame(manifest, data, view)
    if frame is None or data.decode in ("hybrid", "gpu") or (train and data.after_crop):
        return False
    decoded = manifest.sizes.astype(np.int64).prod(axis=1).sum()
    kept = len(manifest.target) * math.prod(frame)
    return bool(3 * max(decoded, kept) <= AUTO_BYTES)


def _frame(manifest: Manifest, data: Data, view: str) -> tuple[int, int] | None:
    """Height and width of what is kept of each image; None where the images differ in size."""
    if view == "none":
        return data.size, data.size
    readable = _readable(manifest)
    if not len(readable) or (readable != readable[0]).any():
        return None
    height, width = (readable[0] + 2 * _border(data, view)).tolist()
    return height, width


def _readable(manifest: Manifest) -> NDArray[np.int32]:
    """The sizes of the images that can be read, (n, 2)."""
    return manifest.sizes[(manifest.sizes > 0).all(axis=1)]


def _border(data: Data, view: str) -> int:
    return data.padding if view == "pad_crop" else 0
