"""Files on disks that fill up or fail: whole or not there, or growing without a gap."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: Path, text: str) -> None:
    """All of the file or nothing, whenever the process is killed. OSError names the file."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        error.filename = str(path)
        raise


class Hashed:
    """A file for torch.save, with the checksum (`sum`) of what went into it.

    After an error it takes what comes without writing it, and `new_file` raises: torch.save, which
    seldom stops at once, would make an error of its own of it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.sum = sha256()
        # Of an error the numbers alone: its traceback would keep what is written alive.
        self.failure: tuple[Any, ...] = ()
        self._file = file

    def write(self, data: bytes | memoryview) -> None:
        if not self.failure:
            try:
                self._file.write(data)
                self.sum.update(data)
            except OSError as error:
                self.failure = error.args

    def flush(self) -> None:
        """Done at the end, for good."""


@contextmanager
def new_file(path: Path) -> Iterator[Hashed]:
    """A file to write into, durable when the block ends. OSError names it."""
    try:
        with open(path, "wb") as file:
            yield (hashed := Hashed(file))
            if hashed.failure:
                raise OSError(*hashed.failure)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # a failed write, unlike a failed open, does not name its file
        raise


class Growing:
    """A file that is written at its end.

    What the disk does not take is kept, and written before what comes next: the file has no gap
    once there is room again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, data: bytes) -> None:
        """Write it behind all that waits. OSError names the file; the data then waits too."""
        self._waiting += data
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            error.filename = str(self.path)
            raise

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        self._file.close()


def sync(folder: Path) -> None:
    """Make the names in `folder` durable; without it a power cut can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(folder: Path, size: int) -> None:
    """Raise OSError (no space left) when `size` bytes are more than the disk has for anybody."""
    disk = os.statvfs(folder)
    # A file system that does not count its blocks says that it has none at all.
    if disk.f_blocks and size > disk.f_bfree * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def shortage(folder: Path, size: int) -> str:
    """For messages: `size` bytes that are to be written beside what the disk has."""
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    few = f", {size - free:,} too few" if size > free else ""
    return f"{size:,} bytes, the disk has {free:,} free{few}"
