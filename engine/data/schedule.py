"""The steps of one process: which part of the plan each takes, with unreadable images replaced."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..recipe.data import Data
from .augment import changes
from .batch import Batch
from .manifest import Manifest
from .plan import Ints, Plan, eval_plan, permutation, places, plan
from .quarantine import Quarantine


@dataclass(frozen=True)
class Task:
    """One step of one process."""

    epoch: int
    step: int
    plan: Plan
    valid: int  # rows that count


def share(batch: int, rank: int, world: int, unit: int = 1) -> range:
    """The places in a step of `batch` images that process `rank` of `world` takes.

    They are whole units of so many images, as evenly as these go. ValueError where the batch is not
    of whole units, or has fewer than there are processes; its text goes on from a setting's name.
    """
    units = batch // unit
    if batch % unit or units < world:
        of_units = f" in units of {unit}" if unit > 1 else ""
        raise ValueError(
            f"{batch} images do not go round {world} processes{of_units}; set it to a multiple of "
            f"{unit * world}"
        )
    return range(units * rank // world * unit, units * (rank + 1) // world * unit)


class Schedule:
    """Hands out the tasks of a process: its part of each step of `batch` images.

    Step s takes positions [s * batch, (s + 1) * batch) of the epoch, a process those at the places
    of its `part`. A training step has data.repeats crops of each of its images, spread over its
    positions, so that any number of processes sees the same. Training leaves out the last
    incomplete step; evaluation fills it with the first image. It may be of some `rows` alone.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: Data,
        batch: int,
        *,
        seed: int,
        train: bool,
        part: range | None = None,  # None: all
        views: int | None = None,  # epochs after which the first comes again; None: never
        rows: Ints | None = None,  # of the manifest, to evaluate; None: all
    ) -> None:
        assert rows is None or not train
        self.manifest, self.data, self.whole = manifest, data, batch
        self.seed, self.train, self.views = seed, train, views
        self.part = range(batch) if part is None else part
        self.batch = len(self.part)  # of this process
        self._rows = np.arange(len(manifest.target)) if rows is None else rows
        n = len(self._rows)
        self.steps = n // batch if train else -(-n // batch)
        if self.steps == 0:
            raise ValueError(
                f"run.batch={batch} is larger than the training set of {n} images; lower run.batch"
            )
        if train and 1 < data.repeats >= batch:
            raise ValueError(
                f"data.repeats={data.repeats} would fill run.batch={batch} with crops of a single "
                "image; raise run.batch or lower data.repeats"
            )
        self.quarantine = Quarantine(manifest, data.bad_images, warn=self.part.start == 0)
        self.view = data.augment if train else "none"
        if self.view == "pad_crop":
            self._check_padding()
        self._order: tuple[int, Ints] = (-1, np.empty(0, np.int64))  # of the epoch at hand

    def tasks_from(self, start: int) -> range:
        """The steps of an epoch from `start`; ValueError where it lies outside."""
        if not 0 <= start <= self.steps:
            raise ValueError(f"start={start} is outside an epoch of {self.steps} steps")
        return range(start, self.steps)

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        """The epoch and step that follow: over the end of an epoch; evaluation begins anew."""
        if step + 1 < self.steps:
            return epoch, step + 1
        if not self.train:
            return epoch, 0
        return (epoch + 1 if self.views is None else (epoch + 1) % self.views), 0

    def task(self, epoch: int, step: int) -> Task:
        """The plan of one step; rows now known as unreadable are replaced."""
        positions = self.positions(step)
        sizes, replacement = self.manifest.sizes, self.quarantine.replacement
        if self.train:
            if self._order[0] != epoch:
                self._order = (epoch, permutation(self.seed, epoch, len(sizes)))
            at = places(positions, self.whole, self.data.repeats)
            index = replacement[self._order[1][at]]
            made = plan(self.data, sizes, self.seed, epoch, positions, index=index)
            after = changes(self.data, self.seed, epoch, positions)
            return Task(epoch, step, replace(made, changes=after), self.batch)
        valid = min(max(len(self._rows) - int(positions[0]), 0), self.batch)
        index = replacement[self._rows[np.where(np.arange(self.batch) < valid, positions, 0)]]
        return Task(epoch, step, eval_plan(self.data, sizes, index), valid)

    def names(self, epoch: int, step: int) -> list[str]:
        """This process's files of a training step. A loader may be at another epoch meanwhile."""
        order = permutation(self.seed, epoch, len(self.manifest.target))
        at = places(self.positions(step), self.whole, self.data.repeats)
        rows = self.quarantine.replacement[order[at]]
        return [self.manifest.name(row) for row in rows.tolist()]

    def positions(self, step: int) -> Ints:
        """Where in the epoch this process's images of a step stand."""
        first = step * self.whole + self.part.start
        return np.arange(first, first + self.batch)

    def pack(self, task: Task, images: Tensor) -> Batch:
        """The batch of a task; images: (B, H, W, 3) uint8, not copied."""
        index = task.plan.index
        return Batch(
            images.permute(0, 3, 1, 2),
            torch.from_numpy(self.manifest.target[index]),
            torch.from_numpy(index),
            task.valid,
        )

    def _check_padding(self) -> None:
        sizes, data = self.manifest.sizes, self.data
        small = (sizes > 0).all(axis=1) & (sizes + 2 * data.padding < data.size).any(axis=1)
        if small.any():
            row = int(small.argmax())
            height, width = sizes[row].tolist()
            raise ValueError(
                f"data.augment=pad_crop needs images of data.size={data.size} less twice "
                f"data.padding={data.padding} at least; {self.manifest.name(row)} has "
                f"{height} x {width} pixels: lower data.size or use random_resized_crop"
            )


def plan_digest(manifest: Manifest, data: Data, batch: int, seed: int) -> str:
    """sha256 of what decides the training batches: the images' sizes and labels, their order in the
    first epoch, and what is done in its first step of `batch` images."""
    positions = np.arange(min(batch, len(manifest.target)))
    order = permutation(seed, 0, len(manifest.target))
    index = order[places(positions, batch, data.repeats)]
    made = plan(data, manifest.sizes, seed, 0, positions, index=index)
    after = changes(data, seed, 0, positions)
    found = hashlib.sha256()
    parts = [manifest.sizes, manifest.target, order, index, made.box, made.flip, made.scaled]
    if after is not None:
        parts += [after.ops, after.levels, after.box, after.noise]
    for part in parts:
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()
