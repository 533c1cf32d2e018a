"""An image folder of the size of ImageNet's photographs, made of two that scikit-learn ships.

Random parts of the two, rescaled, with the grain of a camera: the grain brings a file to about
the 110 kB of ImageNet's, and the length of a JPEG decides how long its decoding takes.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ...recipe.data import Data

CLASSES = 4
WIDTHS, HEIGHTS = (400, 600), (300, 450)  # pixels, on average 500 x 375
QUALITIES = (90, 95)
GRAIN = 12.0  # standard deviation, levels of 255
PART = (0.6, 1.0)  # side of the part over the largest of its shape in the photograph
SEED = 0


def write_photos(root: Path, images: int, side: int | None = None) -> None:
    """`images` JPEGs as root/train/<class>/; root/val is the same folder by another name.

    With `side` all are squares of that side.

    The same bytes every time, for one version of Pillow and numpy.
    """
    from sklearn.datasets import load_sample_images  # a second to import

    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(CLASSES):
        (root / "train" / f"class{number}").mkdir(parents=True)
    os.symlink("train", root / "val", target_is_directory=True)

    def write(number: int) -> None:
        rng = np.random.default_rng([SEED, number])
        path = root / "train" / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        quality = int(rng.integers(*QUALITIES, endpoint=True))
        source = sources[int(rng.integers(len(sources)))]
        _photo(source, rng, side).save(path, quality=quality)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(images)))


def made(data: Data, folder: Path, images: int) -> Data:
    """The same section over images that are made below `folder`, unless they are there already:
    photographs, or squares of `size` where windows of that size are cut from a padded image."""
    side = data.size if data.augment == "pad_crop" else None
    root = folder / f"photos-{side or 'large'}"
    if not root.exists():
        write_photos(root, images, side)
    kept = data.model_dump(exclude={"classes", "subset", "images", "loader"})
    return Data.model_validate(kept | {"source": "folder", "root": root})


def _photo(source: Image.Image, rng: np.random.Generator, side: int | None) -> Image.Image:
    width, height = (int(rng.integers(*sides, endpoint=True)) for sides in (WIDTHS, HEIGHTS))
    if side is not None:
        width = height = side
    share = rng.uniform(*PART) * min(source.width / width, source.height / height)
    w, h = width * share, height * share
    left, top = rng.uniform(0, source.width - w), rng.uniform(0, source.height - h)
    part = source.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + w, top + h))
    grain = rng.normal(0, GRAIN, (height, width, 1))
    pixels = (np.asarray(part) + grain).clip(0, 255).astype(np.uint8)
    mirrored = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    return Image.fromarray(np.ascontiguousarray(mirrored))
