"""The loader on NVIDIA DALI's CPU decoders: reads, decodes and resizes what the plan says.

DALI's own reader, shuffling and random crops stay unused, so its prefetching carries no state that
a restart would have to restore.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...recipe.data import Data
from ..batch import Batch
from ..contents import Encoded, Files, Shards
from ..images import UnreadableError
from ..manifest import Manifest
from ..plan import Plan
from ..quarantine import BadImagesError
from ..schedule import Schedule, Task

Fetched = NDArray[np.uint8] | str
Inputs = tuple["list[Fetched]", NDArray[np.int32]]


class DaliLoader:
    """The batches of a schedule, exactly as planned.

    DALI decodes in `workers` threads and keeps `prefetch` batches under way; images are DALI's own
    memory, not copied, or with a GPU as `device` one copy in pinned memory.
    """

    name = "dali"
    decode = "DALI on the CPU, the crop alone"

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        manifest, data = schedule.manifest, schedule.data
        if not isinstance(manifest.content, Encoded):
            raise ValueError(
                f"data.loader=dali reads files and data.source={data.source} has none; use auto"
            )
        _import()
        self._schedule, self._manifest, self._data = schedule, manifest, data
        self._packed = isinstance(manifest.content, Shards)
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="kdfuse-read")
        self._pin = device.type == "cuda"
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()
        self.steps, self.bad = schedule.steps, schedule.quarantine.bad

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start`; nothing before it is read."""
        batches = self._batches(epoch, self._schedule.tasks_from(start))
        self._running.add(batches)
        return batches

    def close(self) -> None:
        """Ends DALI's threads; an epoch in progress ends."""
        for batches in list(self._running):
            batches.close()
        self._pool.shutdown()

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        """One pipeline an epoch. After a decoding error it is invalid, batches under way included,
        so a new one starts at the step that failed.
        """
        feed = _Feed(self._schedule, epoch, steps, self._fetch)
        pipe = self._pipeline(self._schedule.batch, feed)
        for step in steps:
            while True:
                try:
                    images = pipe.run()[0].as_tensor()
                    break
                except BadImagesError:
                    raise
                except RuntimeError as error:
                    self._blame(feed.ahead[0], error)
                feed = _Feed(self._schedule, epoch, range(step, self.steps), self._fetch)
                pipe = self._pipeline(self._schedule.batch, feed)
            pixels = torch.from_dlpack(images)
            yield self._schedule.pack(
                feed.ahead.popleft(), pixels.pin_memory() if self._pin else pixels
            )

    def _blame(self, task: Task, error: RuntimeError) -> None:
        """Quarantines the files of a failed batch that are bad; raises where none is.

        A file is bad when it cannot be decoded whole, as for the other loaders, or when DALI
        refuses it alone.
        """
        for row in dict.fromkeys(task.plan.index.tolist()):
            try:
                self._manifest.read(row)
            except UnreadableError as fault:
                self._schedule.quarantine.add(row, str(fault))
        if self._schedule.quarantine.bad.keys().isdisjoint(task.plan.index.tolist()):
            self._try_each(task)
        if self._schedule.quarantine.bad.keys().isdisjoint(task.plan.index.tolist()):
            raise RuntimeError(
                f"DALI failed at epoch {task.epoch}, step {task.step}, though each of its images "
                f"can be decoded alone; data.loader=torchvision does without DALI: {error}"
            ) from error

    def _try_each(self, task: Task) -> None:
        for i, row in enumerate(task.plan.index.tolist()):
            one = _row(task.plan, i)
            fetched = _fetch(self._manifest, row)
            if isinstance(fetched, str):
                self._schedule.quarantine.add(row, fetched)
                continue
            try:
                self._pipeline(1, [([fetched], _numbers(one))]).run()
            except RuntimeError:  # its text does not name the file
                self._schedule.quarantine.add(row, "DALI cannot decode it, though PIL can")

    def _pipeline(self, batch: int, feed: Any) -> Any:
        return _pipeline(self._data, self._schedule.view, batch, feed, packed=self._packed)

    def _fetch(self, rows: list[int]) -> list[Fetched]:
        """What DALI is fed for these rows. It reads files in its own threads; tars are read here,
        in as many.
        """
        fetch = partial(_fetch, self._manifest)
        return list(self._pool.map(fetch, rows) if self._packed else map(fetch, rows))


class _Feed:
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
        return [fetched[row] for row in rows], _numbers(task.plan)


def _import() -> Any:
    """nvidia.dali, imported when first used: it takes a second and may be absent."""
    try:
        import nvidia.dali as dali
    except ImportError as error:
        raise ValueError(
            "data.loader=dali needs NVIDIA DALI, which cannot be imported "
            f"({error}): pip install nvidia-dali-cuda130, or set data.loader=torchvision"
        ) from error
    return dali


def _pipeline(data: Data, view: str, batch: int, feed: Any, *, packed: bool) -> Any:
    """A built pipeline whose only output is (batch, size, size, 3) uint8.

    It is fed the files' paths, or with `packed` their bytes.

    Linear interpolation with antialiasing is what PIL and torchvision do, but for the outermost
    output pixels, where DALI repeats the border and they leave it out. EXIF is ignored.
    """
    dali = _import()
    fn, types = dali.fn, dali.types
    pipe = dali.Pipeline(batch, data.workers, None, prefetch_queue_depth=data.prefetch)
    decode = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
    with pipe:
        source, task = fn.external_source(
            feed, num_outputs=2, ndim=1, dtype=[types.UINT8, types.INT32]
        )
        file = source if packed else fn.io.file.read(source)
        place = {"start": task[0:2], "shape": task[2:4], "axes": (0, 1)}
        if view == "pad_crop":
            image = fn.slice(fn.decoders.image(file, **decode), out_of_bounds_policy="pad", **place)
        else:
            image = fn.decoders.image_slice(file, **place, **decode)
            size = fn.cast(task[4:6], dtype=types.FLOAT)
            image = fn.resize(image, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        if view == "none":
            image = fn.slice(image, start=task[6:8], shape=[data.size, data.size], axes=(0, 1))
        pipe.set_outputs(fn.flip(image, horizontal=task[8]))
    pipe.build()
    return pipe


def _fetch(manifest: Manifest, row: int) -> Fetched:
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


def _numbers(plan: Plan) -> NDArray[np.int32]:
    """(B, 9): box, scaled, window, flip."""
    numbers = [plan.box, plan.scaled, plan.window, plan.flip[:, None]]
    return np.concatenate(numbers, axis=1, dtype=np.int32)


def _row(plan: Plan, i: int) -> Plan:
    """The plan of one of its rows alone."""
    one = slice(i, i + 1)
    return replace(
        plan,
        index=plan.index[one],
        box=plan.box[one],
        flip=plan.flip[one],
        scaled=plan.scaled[one],
        window=plan.window[one],
    )
