"""What the rows of a manifest are made of: files, members of tars, pixels in memory.

The encoded ones also have `open(row)`: the image file, as it would lie on a disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .byte_range import open_range
from .images import decode, open_file


class Content(Protocol):
    """What a manifest asks of its rows, by their number."""

    def name(self, row: int) -> str:
        """For messages."""

    def changed(self, row: int) -> str | None:
        """Why the row is no longer what was indexed (missing, other length), or None."""

    def read(self, row: int) -> Image.Image:
        """The whole image, RGB; raises UnreadableError."""


@dataclass(frozen=True)
class Files:
    """One image file a row."""

    paths: list[str]
    lengths: NDArray[np.int64]  # (n,) bytes of each file

    def name(self, row: int) -> str:
        return self.paths[row]

    def changed(self, row: int) -> str | None:
        return _changed(self.paths[row], int(self.lengths[row]))

    def open(self, row: int) -> BinaryIO:
        return open_file(self.paths[row])

    def read(self, row: int) -> Image.Image:
        return decode(partial(self.open, row))


@dataclass(frozen=True)
class Shards:
    """One member of a tar a row, read where it lies in the tar."""

    tars: list[str]
    tar_bytes: list[int]  # of each tar
    names: list[str]  # of each member
    tar: NDArray[np.int64]  # (n,) number of the row's tar
    offset: NDArray[np.int64]  # (n,) where the image begins in it
    lengths: NDArray[np.int64]  # (n,) bytes of each image

    def name(self, row: int) -> str:
        """As if the tar were a folder."""
        return f"{self.tars[self.tar[row]]}/{self.names[row]}"

    def changed(self, row: int) -> str | None:
        return _changed(self.tars[self.tar[row]], self.tar_bytes[self.tar[row]])

    def open(self, row: int) -> BinaryIO:
        return open_range(self.tars[self.tar[row]], int(self.offset[row]), int(self.lengths[row]))

    def read(self, row: int) -> Image.Image:
        return decode(partial(self.open, row))


@dataclass(frozen=True)
class Pixels:
    """Images of one size in memory."""

    source: str  # for messages
    pixels: NDArray[np.uint8]  # (n, H, W, 3)

    def name(self, row: int) -> str:
        return f"{self.source} image {row}"

    def changed(self, row: int) -> None:
        return None

    def read(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])


Encoded = Files | Shards


def _changed(path: str, length: int) -> str | None:
    """Why a file is no longer the indexed one (missing, other length), or None."""
    try:
        found = os.stat(path).st_size
    except OSError as error:
        return error.strerror or str(error)
    return None if found == length else other_length(found, length)


def other_length(found: int, length: int) -> str:
    """Why a file of `found` bytes is not the indexed one."""
    return f"{found} bytes, was {length} when indexed"
