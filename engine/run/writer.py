"""Checkpoints written by a thread while training goes on: a step pays for a snapshot alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch

from . import checkpoint


class Writer:
    """Writes checkpoints one after the other; as a context, its end waits for the last one.

    One at most is on its way: `save` waits for the one before, and none is dropped. Beside what
    trains there is one copy of what a checkpoint holds, until that is on the disk.

    A checkpoint that the disk does not take is told to `note`, and the run may go on: the ones
    before it are intact. Any other error of the thread is raised by the next call.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        folder: Path,
        name: str,
        tensors: dict[str, Any],
        facts: dict[str, Any],
        *,
        keep: int,
        best: bool = False,
    ) -> None:
        """As `checkpoint.save` with what the tensors and facts are at this moment."""
        self._tell()
        given = (folder, name, *snapshot((tensors, facts)))
        self._thread = Thread(target=self._write, args=given, kwargs={"keep": keep, "best": best})
        self._thread.start()

    def check(self) -> None:
        """Tell what came of a checkpoint, where that is known, without waiting for it."""
        if self._thread is not None and not self._thread.is_alive():
            self._tell()

    def finish(self) -> None:
        """Wait for the checkpoint on its way. Raises CheckpointError if it is not on the disk."""
        if self._thread is None:
            return
        self._thread.join()  # which Ctrl-C may end: the checkpoint is then still on its way
        error, self._thread, self._error = self._error, None, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # by its traceback it would keep the snapshot, and itself, alive

    def _write(self, *given: Any, **options: Any) -> None:
        try:
            checkpoint.save(*given, **options)
        except BaseException as error:
            self._error = error

    def _tell(self) -> None:
        try:
            self.finish()
        except checkpoint.CheckpointError as error:
            self._note(f"{error}; the run goes on without it")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tell()


def snapshot(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples that no later step changes.

    Its tensors are on the CPU, those of a GPU in pinned memory, and share storages as the given
    ones do: of a CPU's tensors a checkpoint has the same bytes.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    for tensor in checkpoint.tensors_in(value):
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = _on_the_host(storage)
        like = torch.empty(0, dtype=tensor.dtype)
        copies[id(tensor)] = like.set_(
            storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride()
        )
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()  # the thread makes no call to the device
    return copy.deepcopy(value, copies)


def _on_the_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    held = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.is_cuda)
    return held.untyped_storage().copy_(storage, non_blocking=True)
