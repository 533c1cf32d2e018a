"""The list of images of one split, which everything else names by row number."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import images, synthetic


@dataclass(frozen=True)
class Manifest:
    """n images: files, or (`paths` empty) computed ones of the synthetic source."""

    paths: list[str]
    target: NDArray[np.int64]  # (n,) number of the class
    sizes: NDArray[np.int32]  # (n, 2) height, width in pixels; 0, 0 where unreadable
    lengths: NDArray[np.int64]  # (n,) bytes of each file
    classes: list[str]
    digest: str  # sha256 of relative paths, labels, sizes and file lengths
    bad: dict[int, str] = field(default_factory=dict)  # unreadable rows and why
    stream: int = 0  # synthetic: key of the split's random numbers

    def name(self, row: int) -> str:
        """The file of a row, for messages."""
        return self.paths[row] if self.paths else f"synthetic image {row}"

    def changed(self, row: int) -> str | None:
        """Why a file is no longer the indexed one (missing, other length), or None."""
        if not self.paths:
            return None
        try:
            length = os.stat(self.paths[row]).st_size
        except OSError as error:
            return error.strerror or str(error)
        if length != self.lengths[row]:
            return f"{length} bytes, was {self.lengths[row]} when indexed"
        return None

    def read(self, row: int) -> Image.Image:
        """The whole image of a row, RGB; raises UnreadableError."""
        height, width = self.sizes[row].tolist()
        if not self.paths:
            pixels = synthetic.pixels(
                self.stream, row, int(self.target[row]), len(self.classes), height
            )
            return Image.fromarray(pixels)
        changed = self.changed(row)
        if changed is not None:
            raise images.UnreadableError(changed)
        image = images.decode(self.paths[row])
        if image.size != (width, height):
            raise images.UnreadableError(
                f"{image.height} x {image.width} pixels, was {height} x {width} when indexed"
            )
        return image
