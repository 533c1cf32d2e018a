"""The files of a record while a run writes them, each process those of its places in a batch.

The rows of a shard are first in files beside it, all of which are in the order of the steps:

    00003.rows        whole batches of the first steps, from before the run was last resumed
    00003.of-32-64    places 32 to 63 of the others' batches, in the file as if all steps were there

Each file has one writer, for over a network two would spoil each other's pages. When all steps are
there, the first process makes the shard of them. What lies behind a checkpoint is forgotten when a
run goes on from it, so that the record is that of one course of training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.durable import sync, whole_file
from .shards import CacheError, Layout, look, rows_of, write

Unreadable = Callable[[int, range], dict[int, str]]  # of a view and some of its steps
Rows = NDArray[Any]


class Growing:
    """Steps are counted over all views, from 0. OSError names the file."""

    def __init__(self, folder: Path, layout: Layout, parts: Sequence[range], rank: int) -> None:
        """`parts`: the places of each batch whose rows each process has; `rank` is this one."""
        self.folder, self.layout = folder, layout
        self.parts, self.part = parts, parts[rank]
        self._shards = list(layout.shards())
        self._finished = 0  # of them, by this process
        self._open: dict[Path, int] = {}

    def put(self, step: int, rows: Rows) -> None:
        """The rows of this process's places of a step."""
        if not len(rows):
            return
        view, within = divmod(step, self.layout.steps)
        path = _of(self._shard(view, within), self.part)
        first = within - within % self.layout.length
        _write_at(path, self._file(path), rows.tobytes(), (within - first) * rows.nbytes)

    def flush(self) -> None:
        """Have all rows on the disk, where other machines may read them."""
        try:
            for path, file in self._open.items():
                with _named(path):
                    os.fsync(file)
                sync(path.parent)
        finally:
            self.drop()

    def drop(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def finish(self, before: int, unreadable: Unreadable) -> None:
        """Make the shards whose steps are all before this one; for the first process alone, when
        all have flushed. Raises CacheError for rows that are not there."""
        for view, steps in self._shards[self._finished :]:
            if view * self.layout.steps + steps.stop > before:
                return
            path = self._shard(view, steps.start)
            try:
                look(path, self.layout, view, steps)
            except FileNotFoundError:
                rows = self._rows(view, steps, len(steps))
                write(path, self.layout, view, rows, unreadable(view, steps), {})
            _remove(path, ".rows", ".of-*")
            self._finished += 1

    def rewind(self, to: int, unreadable: Unreadable) -> None:
        """Have the steps before this one and no others; for the first process alone, while no other
        writes. Raises CacheError for rows that are not there."""
        self._finished = 0
        self.finish(to, unreadable)
        for view, steps in reversed(self._shards):
            path = self._shard(view, steps.start)
            done = min(to - view * self.layout.steps - steps.start, len(steps))
            if done == len(steps):
                return
            if done > 0:
                base, rows = path.with_suffix(".rows"), self._rows(view, steps, done)
                with whole_file(base, path.with_suffix(".unfinished")) as file:
                    file.write(rows.tobytes())
                _remove(path, ".shard", ".of-*")
            else:
                _remove(path, ".shard", ".rows", ".of-*")

    def _shard(self, view: int, step: int) -> Path:
        return self.layout.path(self.folder, view, step)

    def _file(self, path: Path) -> int:
        if path not in self._open:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                sync(self.folder)
            self._open[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self._open[path]

    def _rows(self, view: int, steps: range, count: int) -> Rows:
        """The rows of the first so many steps of a shard, from wherever they are."""
        path, layout = self._shard(view, steps.start), self.layout
        if path.exists():
            look(path, layout, view, steps)
            return rows_of(path, layout, 0, count * layout.batch)
        made = np.empty((count, layout.batch), layout.row)
        base = _read(path.with_suffix(".rows"), layout)
        known = min(len(base) // layout.batch, count)
        made[:known] = base[: known * layout.batch].reshape(known, layout.batch)
        there = 0  # places of a batch, in turn
        # By name, too: over a network a folder's list may be a minute old.
        files = {_of(path, part) for part in self.parts} | {*_beside(path, ".of-*")}
        for part, file in sorted((_part(file), file) for file in files):
            width = part[1] - part[0]
            found = _read(file, layout)
            if part[0] == there and part[1] <= layout.batch and len(found) >= count * width:
                made[known:, part[0] : part[1]] = found.reshape(-1, width)[known:count]
                there = part[1]
        if known < count and there < layout.batch:
            first = view * layout.steps + steps.start + known
            raise CacheError(
                f"run.record: {self.folder} lacks what was recorded from step {first} to "
                f"{first + count - known} (of {path}), and the run is beyond it; give the folder "
                "that it recorded into, or train into new ones"
            )
        return made.reshape(-1)


def _of(shard: Path, part: range) -> Path:
    """The file of some places' rows beside a shard."""
    return shard.with_suffix(f".of-{part.start}-{part.stop}")


def _part(file: Path) -> tuple[int, int]:
    first, stop = file.suffix.removeprefix(".of-").split("-")
    return int(first), int(stop)


def _beside(shard: Path, pattern: str) -> list[Path]:
    return list(shard.parent.glob(shard.stem + pattern))


def _remove(shard: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in _beside(shard, pattern):
            path.unlink(missing_ok=True)


def _read(path: Path, layout: Layout) -> Rows:
    """The whole rows of a file; none where there is no file."""
    try:
        held = path.read_bytes()
    except FileNotFoundError:
        held = b""
    return np.frombuffer(held[: len(held) - len(held) % layout.row.itemsize], layout.row)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within, an OSError of a write names the file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _write_at(path: Path, file: int, data: bytes, place: int) -> None:
    with _named(path):
        while data:
            done = os.pwrite(file, data, place)
            data, place = data[done:], place + done
