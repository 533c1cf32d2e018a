"""The files of a cache: rows of one form, and behind them what says whose they are.

A shard holds some steps of a view. It is written by one process, whole or not at all, and depends
on nothing but what it holds, so any number of processes makes the same files in any order.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.durable import whole_file

MAGIC = b"kdfcache"
END = struct.Struct("<Q8s")  # the bytes of the trailer before it, and MAGIC
LONGEST = 1 << 24  # bytes of a trailer
ROWS = 1 << 16  # of a shard, about: what a kill costs
BYTES = 1 << 28  # of a shard at most, unless a step has more: it is made in memory


class CacheError(ValueError):
    """A cache that cannot be used; the text names the file, what is wrong and the cure."""


@dataclass(frozen=True)
class Layout:
    """How the views of a cache lie in its files."""

    digest: str  # of the header
    row: np.dtype[Any]
    views: int
    steps: int  # of a view
    batch: int

    @property
    def length(self) -> int:
        """Steps of a shard; the last one of a view has what is left."""
        rows = min(ROWS, BYTES // self.row.itemsize)
        return max(1, rows // self.batch)

    def shards(self) -> Iterator[tuple[int, range]]:
        """The view and the steps of each shard."""
        for view in range(self.views):
            for first in range(0, self.steps, self.length):
                yield view, range(first, min(first + self.length, self.steps))

    def path(self, folder: Path, view: int, step: int) -> Path:
        """The file with a step of a view."""
        return folder / f"view-{view:05d}" / f"{step // self.length:05d}.shard"


def write(
    path: Path,
    layout: Layout,
    view: int,
    rows: NDArray[Any],
    unreadable: dict[int, str],
    sums: dict[str, float],
) -> None:
    """A shard, whole or not at all. OSError names it.

    `unreadable` are the rows of the training set whose images others took the place of, and why;
    `sums` over its views of what `kdfuse cache show` prints.
    """
    held = rows.tobytes()
    trailer = {
        "cache": layout.digest,
        "view": view,
        "name": path.name,
        "rows": len(rows),
        "sha256": sha256(held).hexdigest(),
        "unreadable": {str(row): unreadable[row] for row in sorted(unreadable)},
        "sums": sums,
    }
    text = json.dumps(trailer, sort_keys=True).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, path.with_suffix(".unfinished")) as file:
        file.write(held)
        file.write(text)
        file.write(END.pack(len(text), MAGIC))


def look(path: Path, layout: Layout, view: int, steps: range) -> dict[str, Any]:
    """The trailer of a shard, and whether the file has the size that it says; no row is read.

    Raises FileNotFoundError where there is none, CacheError for a damaged or a foreign one.
    """
    rows = len(steps) * layout.batch
    size = rows * layout.row.itemsize
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        file.seek(max(end - END.size, 0))
        tail = file.read(END.size)
        length, magic = END.unpack(tail) if len(tail) == END.size else (0, b"")
        if magic != MAGIC or length > LONGEST or end != size + length + END.size:
            raise _damaged(path, "it is cut off, or not a shard of this cache")
        file.seek(size)
        text = file.read(length)
    try:
        found = json.loads(text)
        bad = {int(row): str(why) for row, why in found["unreadable"].items()}
        said = (found["cache"], found["view"], found["name"], found["rows"])
        digest, wanted = str(found["sha256"]), (layout.digest, view, path.name, rows)
        sums = {str(name): float(value) for name, value in found["sums"].items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise _damaged(path, "its last bytes are not those of a shard") from None
    if said != wanted:
        raise _damaged(path, "it belongs to another cache, or to another place of this one")
    return {"sha256": digest, "unreadable": bad, "sums": sums}


def verify(path: Path, layout: Layout, view: int, steps: range) -> None:
    """Read a whole shard; CacheError where its bytes are not those that were written."""
    found = look(path, layout, view, steps)
    size = len(steps) * layout.batch * layout.row.itemsize
    with open(path, "rb") as file:
        held = file.read(size)
    if sha256(held).hexdigest() != found["sha256"]:
        raise _damaged(path, "its rows do not match their checksum")


def rows_of(path: Path, layout: Layout, first: int, count: int) -> NDArray[Any]:
    """So many rows of a shard that `look` has seen. CacheError where they are gone since.

    They are read and not mapped: where a mapped file is cut off, the process is killed.
    """
    size = layout.row.itemsize
    try:
        with open(path, "rb", buffering=0) as file:
            held = os.pread(file.fileno(), count * size, first * size)
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}; it was there when the run began") from error
    if len(held) < count * size:
        raise _damaged(path, "it was cut off since the run began")
    return np.frombuffer(held, layout.row)


def _damaged(path: Path, why: str) -> CacheError:
    return CacheError(f"{path}: {why}; restore it from a copy, or remove it and record again")
