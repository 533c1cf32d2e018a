"""Where images come from: which source reads what, and the manifest that it gives."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ...recipe.schema import Data
from ..contents import Pixels
from ..manifest import Manifest, digest_of
from ..plan import key
from .cifar import read_cifar
from .digits import write_digits
from .folder import open_folder
from .glyphs import read_glyphs
from .splits import SPLITS, Split, rows_kept
from .synthetic import IMAGES, Synthetic
from .tar import open_shards


def open_source(data: Data, split: Split) -> Manifest:
    """The manifest of one split; `subset` keeps the first of each class.

    FileNotFoundError where a file or folder is missing, ValueError for one that is damaged, for an
    empty class, for classes that differ between the splits or from `data.classes`, and for a
    `subset` above what a class has.
    """
    if data.source == "synthetic":
        return _synthetic(data, split)
    root = data.root
    assert root is not None  # the schema asks for it
    if data.source == "cifar10" or data.source == "cifar100":
        return _in_memory(data, split, *read_cifar(data.source, root, split))
    if data.source == "glyphs":
        return _in_memory(data, split, *read_glyphs(root, data.images, split))
    if data.source == "tar":
        return open_shards(data, root, split)
    if data.source == "digits":
        write_digits(root)
    return open_folder(data, root, split)


def _synthetic(data: Data, split: Split) -> Manifest:
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


def _in_memory(
    data: Data,
    split: Split,
    pixels: NDArray[np.uint8],  # (n, H, W, 3), contiguous
    target: NDArray[np.int64],
    classes: list[str],
) -> Manifest:
    rows = rows_kept(data, split, target, classes)
    if len(rows) < len(target):
        pixels, target = pixels[rows], target[rows]
    sizes = np.full((len(target), 2), pixels.shape[1:3], np.int32)
    digest = hashlib.sha256(pixels.data)
    digest.update(target.astype("<i8").tobytes())
    content = Pixels(f"{data.source} {split}", pixels)
    return Manifest(content, target, sizes, classes, digest.hexdigest())
