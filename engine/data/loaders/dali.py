"""The loader on NVIDIA DALI: reads files and decodes the part that the plan names.

DALI's own reader, shuffling and random crops stay unused, so its prefetching carries no state that
a restart would have to restore. On a CPU PyTorch resizes, in threads of the loader: its kernel for
bytes takes a third of the time of DALI's, and rounds and treats borders as PIL does.
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

from ..batch import Batch
from ..contents import Encoded, other_length
from ..images import UnreadableError
from ..plan import Plan
from ..schedule import Schedule, Task
from .dali_feed import Feed, Reader, fetch, inputs
from .dali_gpu import gpu_of, taken
from .dali_graph import DEVICES, graph, import_dali, mixed_options
from .decoding import decoding
from .finish import finish

Pending = tuple[Task, Tensor, "list[Future[None]]"]


class DaliLoader:
    """The batches of a schedule, exactly as planned.

    DALI decodes in `workers` threads and keeps `prefetch` batches under way, over the ends of
    epochs. In mode cpu as many threads resize one batch more; with a GPU as `device` it lies in
    pinned memory. In the other modes batches are made on `device` and stay there.
    """

    name = "dali"

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        manifest, data = schedule.manifest, schedule.data
        if not isinstance(manifest.content, Encoded):
            raise ValueError(
                f"data.loader=dali reads files and data.source={data.source} has none; use auto"
            )
        import_dali()
        self.mode, self.decode = decoding(data, self.name, device)
        self._schedule, self._manifest, self._data = schedule, manifest, data
        self._reader = Reader(manifest, data.workers)
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="kdfuse-resize")
        self._device, self._mixed = device, {}
        self._gpu = gpu_of(device) if self.mode != "cpu" else None
        if self.mode == "gpu":
            self._mixed = mixed_options(manifest.sizes, data.hw_decoder_load)
        self._pin = device.type == "cuda"
        # Made when first asked for, and again after a decoding error or a jump.
        self._pipe: Any = None
        self._feed: Feed | None = None
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()
        self.steps, self.quarantine = schedule.steps, schedule.quarantine
        self.names = schedule.names

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start`; nothing before it is read.

        Quickest for the epoch that follows the last one at its end: it is under way by then. Any
        other place is a jump, at which the decoding starts anew, and so it does for a file that
        another process has found bad.
        """
        steps = self._schedule.tasks_from(start)
        if self._feed is not None and not all(map(self._usable, self._feed.ahead)):
            self._stop()
        make = self._resized if self.mode == "cpu" else self._made_by_dali
        batches = make(epoch, steps)
        self._running.add(batches)
        return batches

    def close(self) -> None:
        """Ends DALI's threads; an epoch in progress ends."""
        for batches in list(self._running):
            batches.close()
        self._stop()
        self._reader.close()
        self._pool.shutdown()

    def _resized(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        pending: deque[Pending] = deque()
        for step in steps:
            pending.append(self._resize(*self._next(epoch, step)))
            if len(pending) > 1:  # one is resized while the next is decoded
                yield self._finish(*pending.popleft())
        while pending:
            yield self._finish(*pending.popleft())

    def _made_by_dali(self, epoch: int, steps: range) -> Generator[Batch, None, None]:
        stream = torch.cuda.Stream(self._device)
        for step in steps:
            task, images = self._next(epoch, step)
            yield self._schedule.pack(task, taken(images, stream))

    def _next(self, epoch: int, step: int) -> tuple[Task, Any]:
        """What DALI makes of a step. After a decoding error its pipeline is invalid, batches under
        way included, so a new one starts at the step that failed, as after a file of another
        length.
        """
        while True:
            if self._feed is None or self._feed.due != (epoch, step):
                self._start(epoch, step)
            feed = self._feed
            assert feed is not None
            try:
                made, lengths = self._pipe.run()
            except StopIteration:
                self._stop()
                assert feed.failure is not None
                raise feed.failure from None
            except RuntimeError as error:
                self._stop()
                self._blame(feed.ahead[0], error)
                continue
            if not self._changed(feed.ahead[0], lengths):
                return feed.ahead.popleft(), made
            self._stop()

    def _start(self, epoch: int, step: int) -> None:
        self._stop()  # first: two pipelines would take twice the memory
        self._feed = Feed(self._schedule, epoch, step, self._reader, resizes=self.mode != "cpu")
        self._pipe = self._pipeline(self._schedule.batch, self._feed)

    def _stop(self) -> None:
        self._pipe = self._feed = None

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

    def _changed(self, task: Task, lengths: Any) -> bool:
        """Whether a file is of another length than the indexed one; quarantines those that are.

        A crop may miss the damage of a cut file, so DALI's errors alone would depend on the crop.
        """
        content = self._manifest.content
        assert isinstance(content, Encoded)
        index = task.plan.index
        found, indexed = lengths.as_array()[:, 0], content.lengths[index]
        wrong = np.flatnonzero(found != indexed)
        for i in wrong:
            why = other_length(int(found[i]), int(indexed[i]))
            self.quarantine.add(int(index[i]), why)
        return bool(len(wrong))

    def _usable(self, task: Task) -> bool:
        """Whether no file of the batch is known as bad by now."""
        return self.quarantine.bad.keys().isdisjoint(task.plan.index.tolist())

    def _blame(self, task: Task, error: RuntimeError) -> None:
        """Quarantines the files of a failed batch that are bad; raises where none is.

        A file is bad when it cannot be decoded whole, as for the other loaders, or when DALI
        refuses it alone.
        """
        for row in dict.fromkeys(task.plan.index.tolist()):
            try:
                self._manifest.read(row)
            except UnreadableError as fault:
                self.quarantine.add(row, str(fault))
        if self._usable(task):
            self._try_each(task)
        if self._usable(task):
            raise RuntimeError(
                f"DALI failed at epoch {task.epoch}, step {task.step}, though each of its images "
                f"can be decoded alone; data.loader=torchvision does without DALI: {error}"
            ) from error

    def _try_each(self, task: Task) -> None:
        for i, row in enumerate(task.plan.index.tolist()):
            one = _row(task.plan, i)
            fetched = fetch(self._manifest, row)
            if isinstance(fetched, str):
                self.quarantine.add(row, fetched)
                continue
            try:
                alone = inputs([fetched], one, resizes=self.mode != "cpu")
                self._pipeline(1, [alone]).run()
            except RuntimeError:  # its text does not name the file
                self.quarantine.add(row, "DALI cannot decode it, though PIL can")

    def _pipeline(self, batch: int, feed: Any) -> Any:
        """A built pipeline that gives what `mode` leaves to DALI, and the files' lengths."""
        data = self._data
        pipe = import_dali().Pipeline(
            batch, data.workers, self._gpu, prefetch_queue_depth=data.prefetch
        )
        with pipe:
            made = graph(
                feed,
                DEVICES[self.mode],
                data.size,
                pads=self._schedule.view == "pad_crop",
                packed=self._reader.packed,
                mixed=self._mixed,
            )
            pipe.set_outputs(*made)
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
