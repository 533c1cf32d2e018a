"""Decoded images with their boxes, in an order that (seed, epoch) alone decide."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..data.images import UnreadableError, decode
from ..data.plan import AUGMENT, Ints, key, permutation, uniforms
from .coco import Coco
from .recipe import CocoData


@dataclass(frozen=True)
class Sample:
    """One image of its own size, H x W, with k boxes."""

    image: Tensor  # (3, H, W) uint8
    boxes: Tensor  # (k, 4) float32: left, top, right, bottom in pixels
    labels: Tensor  # (k,) int64
    row: int  # of the Coco

    def on(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Image in 0..1 and target, as torchvision's detectors take them."""
        image = self.image.to(device, non_blocking=True).float() / 255
        target = {"boxes": self.boxes, "labels": self.labels}
        return image, {k: v.to(device, non_blocking=True) for k, v in target.items()}


class Loader:
    """Batches of `batch` images for process `rank` of `world`.

    Training: step s takes positions [s * batch * world, (s + 1) * batch * world) of the epoch's
    permutation, rank r their r-th slice; the last incomplete step is left out, and each position
    flips by a hash of (seed, epoch, position). Evaluation: every image once, rank r those at
    r, r + world, ...; the last batch may be smaller, and processes may have one more than others.
    """

    def __init__(
        self, coco: Coco, data: CocoData, batch: int, *, seed: int, rank: int, world: int
    ) -> None:
        self.coco, self.data, self.batch = coco, data, batch
        self.seed, self.rank, self.world = seed, rank, world
        self.steps = len(coco) // (batch * world)
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="kdfuse-decode")

    def close(self) -> None:
        """Ends the threads; an epoch in progress cannot go on."""
        self._pool.shutdown(cancel_futures=True)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Sample]]:
        """The training batches of an epoch from step `start`; nothing before it is read."""
        order = permutation(self.seed, epoch, len(self.coco))
        flips = uniforms(key(self.seed, epoch, AUGMENT), np.arange(len(order))) < 0.5
        plans = []
        for step in range(start, self.steps):
            at = self._positions(step)
            plans.append((order[at], flips[at] & self.data.flip))
        return self._read(plans)

    def names(self, epoch: int, step: int) -> list[str]:
        """The files of a training step."""
        order = permutation(self.seed, epoch, len(self.coco))
        return [str(self.coco.path(row)) for row in order[self._positions(step)].tolist()]

    def _positions(self, step: int) -> slice:
        first = (step * self.world + self.rank) * self.batch
        return slice(first, first + self.batch)

    def every(self) -> Iterator[list[Sample]]:
        """All images of this process, for evaluation."""
        rows = np.arange(self.rank, len(self.coco), self.world)
        parts = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        return self._read([(part, np.zeros(len(part), bool)) for part in parts])

    def _read(self, plans: list[tuple[Ints, np.ndarray]]) -> Iterator[list[Sample]]:
        ahead: deque[list[Future[Sample]]] = deque()
        coming = iter(plans)
        try:
            for plan in islice(coming, self.data.prefetch):
                ahead.append(self._submit(plan))
            while ahead:
                batch = [future.result() for future in ahead[0]]
                ahead.popleft()
                for plan in islice(coming, 1):
                    ahead.append(self._submit(plan))
                yield batch
        finally:
            for futures in ahead:
                for future in futures:
                    future.cancel()

    def _submit(self, plan: tuple[Ints, np.ndarray]) -> list[Future[Sample]]:
        return [
            self._pool.submit(self._sample, row, flip)
            for row, flip in zip(plan[0].tolist(), plan[1].tolist(), strict=True)
        ]

    def _sample(self, row: int, flip: bool) -> Sample:
        path = self.coco.path(row)
        try:
            pixels = np.asarray(decode(lambda: open(path, "rb")))  # (H, W, 3)
        except UnreadableError as error:
            raise ValueError(f"{path}: {error}; replace the file") from error
        size = tuple(self.coco.sizes[row].tolist())
        if pixels.shape[:2] != size:
            raise ValueError(
                f"{path}: {pixels.shape[:2]} (height, width), the annotations say {size}; "
                "the boxes are of another image"
            )
        boxes, labels = (array.copy() for array in self.coco.targets(row))
        if flip:
            pixels = pixels[:, ::-1]
            boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return Sample(image, torch.from_numpy(boxes), torch.from_numpy(labels), row)
