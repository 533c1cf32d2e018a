"""Loader torchvision with data.decode=gpu: nvJPEG decodes a step's JPEGs in one call.

Threads read the files; one more decodes, crops and resizes on a stream of its own, ahead of the
training loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..plan import Plan
from ..schedule import Schedule, Task
from .decoding import Mode, decoding
from .jpegs import File, batch_of, by_pil, check_decoder, read
from .vision import Pending, in_order


class Made(NamedTuple):
    """What came of a step."""

    images: Tensor | None  # (B, size, size, 3) uint8; None where files are bad
    faults: dict[int, str]  # why, by the place in the batch
    refused: list[int]  # places whose JPEG the device does not decode


class NvjpegLoader:
    """The batches of a schedule, exactly as planned, on `device`.

    `workers` threads read; `prefetch` batches are under way while one is in use. Neither changes
    what comes out. On a CPU torchvision's own decoder takes nvJPEG's place. ValueError where
    torchvision decodes no JPEG on `device`.
    """

    name = "torchvision"
    mode: Mode = "gpu"

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self._schedule, self._device = schedule, device
        self._manifest, self._data = schedule.manifest, schedule.data
        self.decode = decoding(self._data, self.name, device).text
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with whole_on(self._stream):
            check_decoder(device)
        self._readers = ThreadPoolExecutor(self._data.workers, thread_name_prefix="kdfuse-read")
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="kdfuse-decode")
        self._refused: set[int] = set()  # rows of the manifest that PIL alone decodes
        self._told = False
        self.steps, self.quarantine = schedule.steps, schedule.quarantine
        self.names = schedule.names

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start`; nothing before it is read."""
        steps = self._schedule.tasks_from(start)
        return in_order(partial(self._begin, epoch), self._finish, steps, self._data.prefetch)

    def close(self) -> None:
        """Ends the threads; an epoch in progress cannot go on."""
        self._readers.shutdown(cancel_futures=True)
        self._maker.shutdown(cancel_futures=True)

    def _begin(self, epoch: int, step: int) -> Pending[Future[Made]]:
        task = self._schedule.task(epoch, step)
        rows = range(len(task.plan.index))
        files = [self._readers.submit(self._read, task.plan, i) for i in rows]
        made = self._maker.submit(self._make, task.plan, files)
        return task, made, [*files, made]

    def _read(self, plan: Plan, i: int) -> File | str:
        return read(self._manifest, plan, i, self._data.size, self._refused)

    def _make(self, plan: Plan, jobs: list[Future[File | str]]) -> Made:
        found = [job.result() for job in jobs]
        files = [file for file in found if not isinstance(file, str)]
        faults = {i: why for i, why in enumerate(found) if isinstance(why, str)}
        if faults:
            return Made(None, faults, [])
        with whole_on(self._stream):
            images, refused = batch_of(files, plan, self._data.size, self._device)
            for i in refused:
                self._refused.add(int(plan.index[i]))
                again = by_pil(self._manifest, plan, i, self._data.size)
                if isinstance(again, str):
                    faults[i] = again
                else:
                    images[i] = again
        return Made(None if faults else images, faults, refused)

    def _finish(self, task: Task, job: Future[Made], jobs: list[Future[Any]]) -> Batch:
        """Waits for a batch; where a file is bad, plans its step anew and makes it again."""
        while True:
            images, faults, refused = job.result()
            self._tell(task, [i for i in refused if i not in faults])
            if images is not None:
                break
            for i, why in faults.items():
                self.quarantine.add(int(task.plan.index[i]), why)
            task, job, _ = self._begin(task.epoch, task.step)
        if self._stream is not None:  # or its memory is used anew while the step still reads
            images.record_stream(torch.cuda.current_stream(self._device))
        return self._schedule.pack(task, images)

    def _tell(self, task: Task, places: list[int]) -> None:
        if places and not self._told:
            self._told = True
            name = self._manifest.name(int(task.plan.index[places[0]]))
            warnings.warn(
                f"{self._device} does not decode {name}, though PIL does: such files are decoded "
                "on the CPU",
                stacklevel=2,
            )


@contextmanager
def whole_on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is done within is done on a stream, and whole at the end; None: on the CPU.

    torchvision takes memory for its images on the current stream, and writes to it on a stream of
    its own that does not wait for this one. So nothing may be left to do here when it is called,
    by others with the same stream of PyTorch's pool neither.
    """
    if stream is None:
        yield
        return
    stream.synchronize()
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
