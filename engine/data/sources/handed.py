"""Data sets that are handed over as objects: source `own`, for engine.distill."""

from __future__ import annotations

import hashlib
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from ...recipe.data import Data
from ..contents import Files
from ..items import Dataset, ItemError, Pictures, Tensors, kind_of, pair
from ..manifest import Manifest, digest_of
from .header_cache import THREADS
from .image_sizes import read_sizes
from .splits import Split

# The sets of the run at work in this process.
HANDED: dict[Split, Manifest] = {}
PATIENCE = 3.0  # seconds of reading before it is told
SAMPLED = 32  # images, evenly spread, whose pixels tell a set from another of the same labels


def open_handed(data: Data, split: Split) -> Manifest:
    """The set that was handed over; ValueError where none was."""
    if split not in HANDED:
        raise ValueError(
            "data.source=own: its images are objects of the program that called "
            "kdfuse.engine.distill; only that program can train and evaluate with them"
        )
    return HANDED[split]


def manifest_of(dataset: Dataset, where: str, classes: Sequence[str] | None = None) -> Manifest:
    """The manifest of a map-style data set whose items are (image, label).

    An image is a path, a PIL image, or a tensor (3, side, side) of uint8 or float32. Labels are
    0 to classes - 1. All items are read once, unless what is needed stands aside: the paths of
    torchvision's ImageFolder without transforms, the labels of a set of tensors with `targets`.
    `classes`: their names; None: `dataset.classes`, or the numbers of the labels that are there.
    Raises TypeError for what is no such data set, ValueError for one that cannot be used.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{where}: wants a data set with __len__ and __getitem__, got {kind_of(dataset)}"
        )
    if not len(dataset):
        raise ValueError(f"{where}: the data set is empty")
    image = _first(dataset, where)
    if (found := _folder(dataset)) is not None:
        made = _files(*found)
    elif isinstance(image, str | Path):
        made = _files(*_read(dataset, where, _path))
    elif isinstance(image, Image.Image):
        made = _pictures(dataset, where)
    elif isinstance(image, Tensor):
        made = _tensors(dataset, where, image)
    else:
        raise TypeError(
            f"{where}[0]: wants a path, a PIL image or a tensor as its image, got {kind_of(image)}"
        )
    content, target, sizes, lengths, bad = made
    if len(bad) == len(target):
        raise ValueError(
            f"{where}: none of its {len(target)} images can be read; the first one is "
            f"{content.name(0)}: {bad[0]}"
        )
    names = list(classes or _named(dataset) or ())
    _check_labels(target, len(names), where)
    names = names or [str(number) for number in range(int(target.max()) + 1)]
    images = content.paths if isinstance(content, Files) else _sample(dataset, where)
    digest = digest_of([*names, *images], target, sizes, lengths)
    return Manifest(content, target, sizes, names, digest, bad)


def _check_labels(target: NDArray[np.int64], names: int, where: str) -> None:
    """Raise ValueError for labels that are not 0 to `names` - 1; with no names, that begin at 1."""
    row = int(target.argmax())
    from_1 = "labels are counted from 0, and none of these is 0; take 1 off each"
    if names and target[row] >= names:
        cure = from_1 if target.min() > 0 else "correct it or classes"
        raise ValueError(f"{where}[{row}]: label {target[row]} of {names} classes; {cure}")
    if not names and target.min() > 0:
        raise ValueError(
            f"{where}: its labels are {target.min()} to {target[row]}; {from_1}, or name the "
            "classes (classes=)"
        )


Kept = TypeVar("Kept")
# Content, labels (n,), sizes (n, 2), lengths of files (n,) or none, unreadable rows and why.
Made = tuple[Any, NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], dict[int, str]]


def _first(dataset: Dataset, where: str) -> Any:
    try:
        return pair(dataset[0])[0]
    except Exception as error:  # whatever the object's own code raises
        raise ItemError(f"{where}[0]: {type(error).__name__}: {error}") from error


def _files(paths: Sequence[str], labels: Sequence[int] | NDArray[np.int64]) -> Made:
    stats = []
    for path in paths:
        try:
            stat = Path(path).stat()
        except OSError:
            stats.append((path, 0, 0))  # its header cannot be read then, and that is told
        else:
            stats.append((path, stat.st_mtime_ns, stat.st_size))
    sizes, bad = read_sizes(stats)
    lengths = np.array([length for _, _, length in stats], np.int64)
    return Files(list(paths), lengths), np.array(labels, np.int64), sizes, lengths, bad


def _pictures(dataset: Dataset, where: str) -> Made:
    sizes, target = _read(dataset, where, _size)
    content = Pictures(dataset, where)
    return content, target, np.array(sizes, np.int32), np.zeros(0, np.int64), {}


def _tensors(dataset: Dataset, where: str, first: Tensor) -> Made:
    if first.ndim != 3 or len(first) != 3 or first.shape[1] != first.shape[2]:
        raise ValueError(
            f"{where}[0]: wants an image of (3, side, side), got {tuple(first.shape)}; let the "
            "data set's transform make it so"
        )
    if first.dtype not in (torch.uint8, torch.float32):
        raise ValueError(
            f"{where}[0]: wants uint8 of 0..255, or float32 as the networks take it, got "
            f"{first.dtype}"
        )
    target = labels_of(dataset)
    if target is None or len(target) != len(dataset):
        _, target = _read(dataset, where, kind_of)
    content = Tensors(dataset, where, target, tuple(first.shape), first.dtype)
    sizes = np.full((len(target), 2), first.shape[1], np.int32)
    return content, target, sizes, np.zeros(0, np.int64), {}


def labels_of(dataset: Any) -> NDArray[np.int64] | None:
    """The labels (n,) of a data set that has them aside; None of any other."""
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, np.int64)]
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    elif getattr(dataset, "target_transform", None) is not None:
        return None
    else:
        found = getattr(dataset, "targets", None)
    try:
        labels = np.asarray(found)
    except (ValueError, RuntimeError):
        return None
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
        return None
    return labels.astype(np.int64)


def _folder(dataset: Any) -> tuple[list[str], list[int]] | None:
    """Paths and labels of torchvision's image folder, where nothing is done to its images."""
    from torchvision.datasets import DatasetFolder  # half a second, for who names a source alone
    from torchvision.datasets.folder import default_loader

    plain = isinstance(dataset, DatasetFolder) and dataset.loader is default_loader
    changing = ("transform", "target_transform", "transforms")
    if not plain or any(getattr(dataset, name, None) is not None for name in changing):
        return None
    return [path for path, _ in dataset.samples], [label for _, label in dataset.samples]


def _named(dataset: Any) -> list[str] | None:
    """The names of the classes that a data set states."""
    if isinstance(dataset, Subset):
        return _named(dataset.dataset)
    found = getattr(dataset, "classes", None)
    return [str(name) for name in found] if isinstance(found, list | tuple) and found else None


def _read(
    dataset: Dataset, where: str, keep: Callable[[Any], Kept]
) -> tuple[list[Kept], NDArray[np.int64]]:
    """What is to be kept of every item's image, and the labels (n,); several threads read."""

    def read(row: int) -> tuple[Kept, int]:
        try:
            image, label = pair(dataset[row])
            return keep(image), label
        except Exception as error:  # whatever the object's own code raises
            raise ItemError(f"{where}[{row}]: {type(error).__name__}: {error}") from error

    found, due = [], time.monotonic() + PATIENCE
    with ThreadPoolExecutor(THREADS) as pool:
        for item in pool.map(read, range(len(dataset))):
            found.append(item)
            if time.monotonic() > due:
                text = f"{where}: reading each of {len(dataset)} items once"
                print(text, file=sys.stderr, flush=True)
                due = math.inf
    kept, labels = zip(*found, strict=True)
    return list(kept), np.array(labels, np.int64)


def _sample(dataset: Dataset, where: str) -> list[str]:
    """Digests of some images, each as it comes after the same seed; "" for one that is another when
    it comes again, which tells nothing."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, SAMPLED).astype(np.int64)).tolist()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            drawn = [(_drawn(dataset, where, row), _drawn(dataset, where, row)) for row in rows]
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    return [first if first == again else "" for first, again in drawn]


def _drawn(dataset: Dataset, where: str, row: int) -> str:
    random.seed(row)
    np.random.seed(row)
    torch.default_generator.manual_seed(row)  # and no device's, which nobody would put back
    try:
        image = pair(dataset[row])[0]
        pixels = image.detach().cpu() if isinstance(image, Tensor) else image.convert("RGB")
        return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    except Exception as error:  # whatever the object's own code raises
        raise ItemError(f"{where}[{row}]: {type(error).__name__}: {error}") from error


def _path(image: Any) -> str:
    if not isinstance(image, str | Path):
        raise TypeError(f"wants a path as the items before, got {kind_of(image)}")
    return str(image)


def _size(image: Any) -> tuple[int, int]:
    if not isinstance(image, Image.Image):
        raise TypeError(f"wants an image as the items before, got {kind_of(image)}")
    return image.height, image.width
