"""Images that are computed, with a pattern of their class that a network can learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...recipe.data import Data
from ..manifest import Manifest, digest_of
from ..plan import key, uniforms
from .splits import SPLITS, Split, rows_kept

IMAGES = 1024  # of a training epoch, unless the recipe says otherwise


def open_synthetic(data: Data, split: Split) -> Manifest:
    """`images` training images; a quarter of that, at least one of each class, for validation."""
    assert data.classes is not None  # the schema asks for it
    images = IMAGES if data.images is None else data.images
    n = images if split == "train" else max(images // 4, data.classes)
    classes = [str(number) for number in range(data.classes)]
    target = np.arange(n) % data.classes
    target = target[rows_kept(data, split, target, classes)]
    n = len(target)
    sizes = np.full((n, 2), data.size, np.int32)
    names = [f"synthetic/{split}/{row}" for row in range(n)]
    digest = digest_of(names, target, sizes, np.zeros(n))
    content = Synthetic(key(SPLITS.index(split)), target, data.classes, data.size)
    return Manifest(content, target, sizes, classes, digest)


@dataclass(frozen=True)
class Synthetic:
    """One computed image a row."""

    stream: int  # key of the split's random numbers
    target: NDArray[np.int64]  # (n,) number of the class
    classes: int
    side: int  # pixels

    def name(self, row: int) -> str:
        return f"synthetic image {row}"

    def changed(self, row: int) -> None:
        return None

    def read(self, row: int) -> Image.Image:
        label = int(self.target[row])
        return Image.fromarray(pixels(self.stream, row, label, self.classes, self.side))


def pixels(stream: int, row: int, target: int, classes: int, side: int) -> NDArray[np.uint8]:
    """Image `row` of the stream, uint8 (side, side, 3): a pure function of its arguments.

    The class sets hue, direction and frequency of a grating; the row sets phase, brightness and
    noise.
    """
    noise = uniforms(key(stream, row), np.arange(side * side * 3 + 2))
    phase, light = noise[:2]
    hue = 2 * np.pi * (target / classes + np.arange(3) / 3)
    angle = np.pi * target * 0.618
    across = np.linspace(0, 2 * np.pi * (2 + target % 3), side)
    wave = across[:, None] * np.sin(angle) + across * np.cos(angle) + 2 * np.pi * phase
    image = 0.5 + 0.2 * np.cos(hue) + 0.1 * np.sin(wave)[:, :, None] + 0.1 * (light - 0.5)
    image = image + 0.2 * (noise[2:].reshape(side, side, 3) - 0.5)
    return (255 * image.clip(0, 1)).astype(np.uint8)
