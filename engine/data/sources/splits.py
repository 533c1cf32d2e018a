"""What sources share: the root, two splits, the subset, classes that agree, images in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...recipe.data import Data
from ..contents import Pixels
from ..manifest import Manifest

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
OTHER: dict[Split, Split] = {"train": "val", "val": "train"}


def root_of(data: Data) -> Path:
    assert data.root is not None  # the schema asks for it
    return data.root


def rows_kept(
    data: Data, split: Split, target: NDArray[np.int64], classes: list[str]
) -> NDArray[np.int64]:
    """The rows in use, ascending: all, or the first `data.subset` of each training class.

    ValueError where a class has fewer.
    """
    rows = np.arange(len(target))
    if split == "val" or data.subset is None:
        return rows
    counts = np.bincount(target, minlength=len(classes))
    least = int(counts.argmin())
    if data.subset > counts[least]:
        raise ValueError(
            f"data.subset={data.subset}, but class {classes[least]!r} has {counts[least]} training "
            "images; lower data.subset"
        )
    order = np.argsort(target, kind="stable")
    first = np.cumsum(counts) - counts  # place in `order` of each class's first row
    return np.sort(order[rows - first[target[order]] < data.subset])


def check_classes(
    data: Data, where: str, kind: str, split: Split, classes: list[str], others: list[str]
) -> None:
    """ValueError where the classes of `split` are not those of the other or not `data.classes`.

    `kind` is what stands for a class there: a folder, a tar, a number.
    """
    mine, theirs = set(classes), set(others)
    if mine != theirs:
        lone = {split: sorted(mine - theirs), OTHER[split]: sorted(theirs - mine)}
        told = "; ".join(
            f"only in {place}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for place, names in lone.items()
            if names
        )
        raise ValueError(
            f"data.root={data.root}: train and val hold different classes ({told}); both need a "
            f"{kind} of each class"
        )
    if data.classes is not None and data.classes != len(classes):
        raise ValueError(
            f"data.classes={data.classes}, but {where} holds {len(classes)} class {kind}s; "
            "correct data.classes or leave it out"
        )


def in_memory(
    data: Data,
    split: Split,
    pixels: NDArray[np.uint8],  # (n, H, W, 3), contiguous
    target: NDArray[np.int64],
    classes: list[str],
) -> Manifest:
    """The manifest of a split whose images are all there, of one size."""
    rows = rows_kept(data, split, target, classes)
    if len(rows) < len(target):
        pixels, target = pixels[rows], target[rows]
    sizes = np.full((len(target), 2), pixels.shape[1:3], np.int32)
    digest = hashlib.sha256(pixels.data)
    digest.update(target.astype("<i8").tobytes())
    content = Pixels(f"{data.source} {split}", pixels)
    return Manifest(content, target, sizes, classes, digest.hexdigest())
