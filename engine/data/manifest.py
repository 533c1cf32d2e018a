"""The list of images of one split, which everything else names by row number."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .contents import Content
from .images import UnreadableError


@dataclass(frozen=True)
class Manifest:
    """n images: what they are made of, their labels and their sizes."""

    content: Content
    target: NDArray[np.int64]  # (n,) number of the class
    sizes: NDArray[np.int32]  # (n, 2) height, width in pixels; 0, 0 where unreadable
    classes: list[str]
    digest: str  # sha256 of names, labels, sizes and lengths, or of pixels and labels
    bad: dict[int, str] = field(default_factory=dict)  # unreadable rows and why

    def name(self, row: int) -> str:
        """The file of a row, for messages."""
        return self.content.name(row)

    def changed(self, row: int) -> str | None:
        """Why a file is no longer the indexed one (missing, other length), or None."""
        return self.content.changed(row)

    def read(self, row: int) -> Image.Image:
        """The whole image of a row, RGB; raises UnreadableError."""
        changed = self.content.changed(row)
        if changed is not None:
            raise UnreadableError(changed)
        height, width = self.sizes[row].tolist()
        image = self.content.read(row)
        if image.size != (width, height):
            raise UnreadableError(
                f"{image.height} x {image.width} pixels, was {height} x {width} when indexed"
            )
        return image


def digest_of(names: list[str], *arrays: np.ndarray) -> str:
    """The same on any machine: names relative to the root, numbers as little-endian int64."""
    digest = hashlib.sha256(os.fsencode("\n".join(names).replace(os.sep, "/")))
    for array in arrays:
        digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()
