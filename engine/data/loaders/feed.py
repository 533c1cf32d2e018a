"""Batches on their way to the device: each is copied while the one before is trained on."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from ..batch import Batch

Item = TypeVar("Item")


def on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """The same batches on the device of the run, in their order.

    To a GPU they are copied on a stream of their own, one ahead of the step, so that the copy takes
    no time of the step's: from pinned memory, as loaders give them, it waits for nothing.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    for batch, copied in one_ahead(copies(batches, side)):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for part in (batch.images, batch.target, batch.index, *batch.answers):
            part.record_stream(current)  # or its memory is used anew while the step still reads
        yield batch


def copies(
    batches: Iterator[Batch], side: torch.cuda.Stream
) -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
    """Copies under way on a stream, and what tells the end of each."""
    for batch in batches:
        with torch.cuda.stream(side):
            images, target, index, *answers = (
                part.to(side.device, non_blocking=True)
                for part in (batch.images, batch.target, batch.index, *batch.answers)
            )
            copied = torch.cuda.Event()
            copied.record(side)
        made = replace(batch, images=images, target=target, index=index, answers=tuple(answers))
        yield made, copied


def one_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Each item once the next one is under way; an error comes after all that were before it."""
    try:
        held = next(items)
    except StopIteration:
        return
    while True:
        try:
            coming = next(items)
        except StopIteration:
            yield held
            return
        except Exception:
            yield held
            raise
        yield held
        held = coming
