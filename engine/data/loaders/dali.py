"""The loader on NVIDIA DALI's CPU decoders: reads files and decodes the part that the plan names.

DALI's own reader, shuffling and random crops stay unused, so its prefetching carries no state that
a restart would have to restore. PyTorch resizes, in threads of the loader: its kernel for bytes
takes a third of the time of DALI's, and rounds and treats borders as PIL does.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ...recipe.data import Data
from ..batch import Batch
from ..contents import Encoded
from ..images import UnreadableError
from ..plan import Plan
from ..quarantine import BadImagesError
from ..schedule import Schedule, Task
from .dali_feed import Feed, Reader, fetch
from .finish import finish

Pending = tuple[Task, Tensor, "list[Future[None]]"]


class DaliLoader:
    """The batches of a schedule, exactly as planned.

    DALI decodes in `workers` threads and keeps `prefetch` batches under way; as many threads resize
    one batch more. With a GPU as `device`, batches lie in pinned memory.
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
        self._reader = Reader(manifest, data.workers)
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="kdfuse-resize")
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
        self._reader.close()
        self._pool.shutdown()

    def _batches(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        """One pipeline an epoch. After a decoding error it is invalid, batches under way included,
        so a new one starts at the step that failed.
        """
        feed = Feed(self._schedule, epoch, steps, self._reader)
        pipe = self._pipeline(self._schedule.batch, feed)
        pending: deque[Pending] = deque()
        for step in steps:
            while True:
                try:
                    crops = pipe.run()[0]
                    break
                except BadImagesError:
                    raise
                except RuntimeError as error:
                    self._blame(feed.ahead[0], error)
                feed = Feed(self._schedule, epoch, range(step, self.steps), self._reader)
                pipe = self._pipeline(self._schedule.batch, feed)
            pending.append(self._resize(feed.ahead.popleft(), crops))
            if len(pending) > 1:  # one is resized while the next is decoded
                yield self._finish(*pending.popleft())
        while pending:
            yield self._finish(*pending.popleft())

    def _resize(self, task: Task, crops: Any) -> Pending:
        """Begins to make a batch of DALI's crops, which are of many sizes."""
        size = self._data.size
        shape = (len(task.plan.index), size, size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
        out = images.numpy()
        parts = [torch.from_dlpack(crops[i]) for i in range(len(out))]
        jobs = [self._pool.submit(_fill, task.plan, i, part, out) for i, part in enumerate(parts)]
        return task, images, jobs

    def _finish(self, task: Task, images: Tensor, jobs: list[Future[None]]) -> Batch:
        for job in jobs:
            job.result()
        return self._schedule.pack(task, images)

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
            fetched = fetch(self._manifest, row)
            if isinstance(fetched, str):
                self._schedule.quarantine.add(row, fetched)
                continue
            try:
                self._pipeline(1, [([fetched], one.box)]).run()
            except RuntimeError:  # its text does not name the file
                self._schedule.quarantine.add(row, "DALI cannot decode it, though PIL can")

    def _pipeline(self, batch: int, feed: Any) -> Any:
        return _pipeline(self._data, self._schedule.view, batch, feed, packed=self._reader.packed)


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
    """A built pipeline whose only output is the planned boxes, uint8 (h, w, 3) each.

    It is fed the files' paths, or with `packed` their bytes. EXIF is ignored.
    """
    dali = _import()
    fn, types = dali.fn, dali.types
    pipe = dali.Pipeline(batch, data.workers, None, prefetch_queue_depth=data.prefetch)
    decode = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
    with pipe:
        source, box = fn.external_source(
            feed, num_outputs=2, ndim=1, dtype=[types.UINT8, types.INT32]
        )
        file = source if packed else fn.io.file.read(source)
        place = {"start": box[0:2], "shape": box[2:4], "axes": (0, 1)}
        if view == "pad_crop":
            image = fn.slice(fn.decoders.image(file, **decode), out_of_bounds_policy="pad", **place)
        else:
            image = fn.decoders.image_slice(file, **place, **decode)
        pipe.set_outputs(image)
    pipe.build()
    return pipe


def _fill(plan: Plan, i: int, crop: Tensor, out: NDArray[np.uint8]) -> None:
    """Row i of the plan done to its decoded box, uint8 (h, w, 3), into out[i].

    Numpy copies and mirrors: PyTorch would start threads of its own in each of the pool's.
    """
    scaled, (y, x) = plan.scaled[i].tolist(), plan.window[i].tolist()
    if list(crop.shape[:2]) != scaled:
        planes = crop.permute(2, 0, 1)[None]
        resized = interpolate(planes, scaled, mode="bilinear", antialias=True)
        crop = resized[0].permute(1, 2, 0)
    size = out.shape[1]
    pixels = crop.numpy()[y : y + size, x : x + size]
    out[i] = pixels[:, ::-1] if plan.flip[i] else pixels
    finish(plan, i, out[i])


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
