"""The sources of images by name; each gives the manifest of a split."""

from __future__ import annotations

from collections.abc import Callable

from ...recipe.data import Data
from ..manifest import Manifest
from .cifar import open_cifar
from .digits import open_digits
from .folder import open_folder
from .glyphs import open_glyphs
from .splits import Split
from .synthetic import open_synthetic
from .tar import open_shards

SOURCES: dict[str, Callable[[Data, Split], Manifest]] = {
    "folder": open_folder,
    "tar": open_shards,
    "digits": open_digits,
    "cifar10": open_cifar,
    "cifar100": open_cifar,
    "glyphs": open_glyphs,
    "synthetic": open_synthetic,
}


def open_source(data: Data, split: Split) -> Manifest:
    """The manifest of one split; `subset` keeps the first of each class.

    FileNotFoundError where a file or folder is missing, ValueError for one that is damaged, for an
    empty class, for classes that differ between the splits or from `data.classes`, and for a
    `subset` above what a class has.
    """
    return SOURCES[data.source](data, split)
