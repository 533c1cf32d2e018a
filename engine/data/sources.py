"""Where images come from: an image folder, scikit-learn's digits, or the synthetic source."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np

from ..schema import Data
from .digits import write_digits
from .headers import read_sizes
from .images import EXTENSIONS
from .manifest import Manifest
from .sampler import key

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
LAYOUT = "expected ROOT/train/<class>/*.jpg and ROOT/val/<class>/*.jpg"


def open_source(data: Data, split: Split) -> Manifest:
    """The manifest of one split, in sorted order; `subset` keeps the first of each class.

    FileNotFoundError where a folder is missing, ValueError for an empty class, for classes that
    differ between the splits or from `data.classes`, and for a `subset` above what a class has.
    """
    if data.source == "synthetic":
        return _synthetic(data, split)
    assert data.root is not None  # the schema asks for it
    if data.source == "digits":
        write_digits(data.root)
    return _folder(data, data.root, split)


def _synthetic(data: Data, split: Split) -> Manifest:
    """`images` training images; a quarter of that, at least one of each class, for validation."""
    assert data.classes is not None  # the schema asks for it
    n = data.images if split == "train" else max(data.images // 4, data.classes)
    target = np.arange(n) % data.classes
    if split == "train" and data.subset is not None:
        short = int(np.bincount(target, minlength=data.classes).min())
        _check_subset(data.subset, short, "the smallest class")
        n = data.subset * data.classes
        target = target[:n]
    sizes = np.full((n, 2), data.size, np.int32)
    classes = [str(number) for number in range(data.classes)]
    stream = key(SPLITS.index(split))
    names = [f"synthetic/{split}/{row}" for row in range(n)]
    lengths = np.zeros(n, np.int64)
    digest = _digest(names, target, sizes, lengths)
    return Manifest([], target, sizes, lengths, classes, digest, stream=stream)


def _folder(data: Data, root: Path, split: Split) -> Manifest:
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder; {LAYOUT}")
    classes = _classes(root, split)
    _check_classes(data, root, split, classes)
    stats: list[tuple[str, int, int]] = []
    target: list[int] = []
    for number, name in enumerate(classes):
        files = _files(root / split / name)
        if split == "train" and data.subset is not None:
            _check_subset(data.subset, len(files), f"class {name!r}")
            files = files[: data.subset]
        stats += files
        target += [number] * len(files)
    sizes, bad = read_sizes(stats)
    paths = [path for path, _, _ in stats]
    lengths = np.array([length for _, _, length in stats], np.int64)
    labels = np.array(target, np.int64)
    digest = _digest([os.path.relpath(path, root) for path in paths], labels, sizes, lengths)
    return Manifest(paths, labels, sizes, lengths, classes, digest, bad)


def _classes(root: Path, split: Split) -> list[str]:
    """Sorted names of the class folders of a split."""
    folder = root / split
    if not folder.is_dir():
        raise FileNotFoundError(f"data.root={root} has no folder {split!r}; {LAYOUT}")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise ValueError(
            f"{folder} holds no class folders; {LAYOUT}: move each image into a folder of its class"
        )
    return names


def _check_classes(data: Data, root: Path, split: Split, classes: list[str]) -> None:
    other: Split = "val" if split == "train" else "train"
    mine, theirs = set(classes), set(_classes(root, other))
    if mine != theirs:
        lone = {split: sorted(mine - theirs), other: sorted(theirs - mine)}
        told = "; ".join(
            f"only in {place}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for place, names in lone.items()
            if names
        )
        raise ValueError(
            f"data.root={root}: train and val hold different classes ({told}); both need a folder "
            "of each class"
        )
    if data.classes is not None and data.classes != len(classes):
        raise ValueError(
            f"data.classes={data.classes}, but {root / split} holds {len(classes)} class folders; "
            "correct data.classes or leave it out"
        )


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Path, modification time in ns and length of the images in one class folder, by name."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir():
                stat = entry.stat()
                found.append((entry.path, stat.st_mtime_ns, stat.st_size))
    if not found:
        raise ValueError(
            f"class folder {folder} holds no image ({', '.join(EXTENSIONS)}); add its images or "
            "remove the folder from both train and val"
        )
    return sorted(found)


def _check_subset(subset: int, available: int, where: str) -> None:
    if subset > available:
        raise ValueError(
            f"data.subset={subset}, but {where} has {available} training images; lower data.subset"
        )


def _digest(names: list[str], *arrays: np.ndarray) -> str:
    """The same on any machine: names relative to the root, numbers as little-endian int64."""
    digest = hashlib.sha256(os.fsencode("\n".join(names).replace(os.sep, "/")))
    for array in arrays:
        digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()
