"""A range of a file's bytes as a file of its own: how one member of a tar is read."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def open_range(path: str, offset: int, length: int) -> io.BufferedReader:
    """The `length` bytes of a file from `offset`, seekable and apart from the rest of the file."""
    return io.BufferedReader(_Range(path, offset, length))


class _Range(io.RawIOBase):
    def __init__(self, path: str, offset: int, length: int) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._offset, self._length, self._place = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if start + place < 0:
            raise ValueError(f"cannot seek to {start + place}, before the start")
        self._place = start + place
        return self._place

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        chunk = self._take(len(view))
        view[: len(chunk)] = chunk
        return len(chunk)

    def readall(self) -> bytes:
        """In one read: the default asks for a few kB at a time."""
        return self._take(self._length)

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()

    def _take(self, most: int) -> bytes:
        wanted = max(min(most, self._length - self._place), 0)
        chunk = os.pread(self._file, wanted, self._offset + self._place)
        self._place += len(chunk)
        return chunk
