"""The peer of the loaders: torchvision's ImageFolder and standard transforms in a DataLoader.

As in the training scripts of torchvision and timm without options: PIL decodes the whole image in
worker processes, and what comes out is normalised float32. Nothing of kdfuse takes part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, Subset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

DECODE = "PIL, whole image"


class Endless(Sampler[int]):
    """Rows of a set for ever: a new random order for each pass, or always the same one."""

    def __init__(self, rows: int, shuffle: bool) -> None:
        self.rows, self.shuffle = rows, shuffle

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.rows).tolist() if self.shuffle else range(self.rows)


def plain_loader(
    folder: str,
    only: Collection[str],
    transform: T.Compose,
    *,
    batch: int,
    workers: int,
    prefetch: int,
    shuffle: bool,
    pin: bool,
) -> DataLoader[Any]:
    """Batches without end of the images in `folder`/<class>/ whose paths are among `only`."""
    images = ImageFolder(folder, transform)
    wanted = set(only)
    rows = [row for row, (path, _) in enumerate(images.samples) if path in wanted]
    if len(rows) < len(wanted):
        raise ValueError(f"ImageFolder({folder!r}) finds {len(rows)} of {len(wanted)} images")
    return DataLoader(
        Subset(images, rows),
        batch,
        sampler=Endless(len(rows), shuffle),
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin,
    )


def train_transform(
    augment: str,
    size: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    padding: int,
    flip: bool,
    resize: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> T.Compose:
    """The training view; `augment` none is the evaluation view, flipped."""
    crops: dict[str, list[Any]] = {
        "random_resized_crop": [T.RandomResizedCrop(size, scale=scale, ratio=ratio)],
        "pad_crop": [T.RandomCrop(size, padding)],
        "none": _whole(size, resize),
    }
    mirror = [T.RandomHorizontalFlip()] if flip else []
    return T.Compose([*crops[augment], *mirror, T.ToTensor(), T.Normalize(mean, std)])


def eval_transform(
    size: int, *, resize: int | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> T.Compose:
    """The whole image, short side to `resize` and the centre; with None straight to `size`."""
    return T.Compose([*_whole(size, resize), T.ToTensor(), T.Normalize(mean, std)])


def _whole(size: int, resize: int | None) -> list[Any]:
    return [T.Resize((size, size))] if resize is None else [T.Resize(resize), T.CenterCrop(size)]
