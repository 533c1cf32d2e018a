"""What a manifest's rows are where they come from a data set object, and not from files."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .images import MODES, UnreadableError


class Dataset(Protocol):
    """A map-style data set: so many items, each an image and its label."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


class ItemError(ValueError):
    """An item of a data set object that cannot be used; the text names it."""

    origin = ""  # the traceback of one that another process met


@dataclass(frozen=True)
class Pictures:
    """Items whose images are PIL's: cropped, flipped and so on as the plan says."""

    dataset: Dataset
    where: str  # what the object is called, for messages

    def name(self, row: int) -> str:
        return f"{self.where}[{row}]"

    def changed(self, row: int) -> None:
        return None

    def read(self, row: int) -> Image.Image:
        try:
            image = self.dataset[row][0]
        except Exception as error:  # whatever the object's own code raises
            raise UnreadableError(f"{type(error).__name__}: {error}") from error
        if not isinstance(image, Image.Image) or image.mode not in MODES:
            raise UnreadableError(f"{kind_of(image)} is no picture of 8 bits a channel")
        return image.convert("RGB")


@dataclass(frozen=True)
class Tensors:
    """Items whose images are tensors, taken as they are: in the plan's order, and no more."""

    dataset: Dataset
    where: str
    target: NDArray[np.int64]  # (n,) number of the class
    shape: tuple[int, ...]  # of each: 3, side, side
    dtype: torch.dtype

    def name(self, row: int) -> str:
        return f"{self.where}[{row}]"

    def changed(self, row: int) -> None:
        return None

    def read(self, row: int) -> Image.Image:
        image = self.item(row)
        if image.dtype != torch.uint8:
            raise UnreadableError(f"a tensor of {image.dtype} is no picture of 8 bits a channel")
        return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())

    def item(self, row: int, seed: int | None = None) -> Tensor:
        """The image of a row; with a seed the object draws its random numbers from that.

        Raises ItemError for one that is not like the others.
        """
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        try:
            image, label = pair(self.dataset[row])
        except Exception as error:
            raise ItemError(f"{self.name(row)}: {type(error).__name__}: {error}") from error
        if not isinstance(image, Tensor) or (image.shape, image.dtype) != (self.shape, self.dtype):
            wanted = f"{tuple(self.shape)} {self.dtype}"
            raise ItemError(
                f"{self.name(row)}: got {kind_of(image)}, and {self.name(0)} is {wanted}; give all "
                "images one shape and type"
            )
        if label != self.target[row]:
            raise ItemError(
                f"{self.name(row)}: got label {label}, which was {self.target[row]} when the "
                "labels were read; an item has to keep its label"
            )
        return image.detach()


def pair(item: Any) -> tuple[Any, int]:
    """Image and label of an item; ValueError for what is none."""
    if isinstance(item, Mapping) or not hasattr(item, "__getitem__") or len(item) < 2:
        raise ValueError(f"wants (image, label), got {kind_of(item)}")
    label = item[1]
    if isinstance(label, Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
        raise ValueError(f"wants the number of a class as its label, got {label!r}")
    return item[0], int(label)


def kind_of(value: Any) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)} {value.dtype}"
    if isinstance(value, Image.Image):
        return f"an image of mode {value.mode}"
    return f"a {type(value).__name__}"
