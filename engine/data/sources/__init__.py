"""The sources of images by name; each gives the manifest of a split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...recipe import registered
from ...recipe.data import DECODED_BY, Data
from ..contents import Encoded
from ..manifest import Manifest
from .cifar import open_cifar
from .digits import open_digits
from .folder import open_folder
from .glyphs import open_glyphs
from .handed import open_handed
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
    "own": open_handed,
}


def open_source(data: Data, split: Split) -> Manifest:
    """The manifest of one split; `subset` keeps the first of each class.

    FileNotFoundError where a file or folder is missing, ValueError for one that is damaged, for an
    empty class, for classes that differ between the splits or from `data.classes`, for a `subset`
    above what a class has, and for what a registered source gives that is no manifest.
    """
    if data.source in registered.SOURCES:
        return _checked(data, registered.SOURCES[data.source](data, split))
    return SOURCES[data.source](data, split)


def _checked(data: Data, found: object) -> Manifest:
    """What a source of somebody else's gave."""
    here = f"data.source={data.source}"
    if not isinstance(found, Manifest):
        raise ValueError(f"{here}: its open gave a {type(found).__name__}, wants a Manifest")
    n, count = len(found.target), len(found.classes)
    for name, array, dtype, shape in (
        ("target", found.target, np.int64, (n,)),
        ("sizes", found.sizes, np.int32, (n, 2)),
    ):
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{here}: {name} of {array.dtype} {array.shape}, wants {dtype.__name__} {shape}"
            )
    if n == 0 or found.target.min() < 0 or found.target.max() >= count:
        raise ValueError(f"{here}: its {n} labels are not all numbers of its {count} classes")
    if data.decode in DECODED_BY and not isinstance(found.content, Encoded):
        raise ValueError(
            f"data.decode: {data.decode} decodes files and source {data.source} has none; use auto"
        )
    if data.classes not in (None, count):
        raise ValueError(
            f"data.classes={data.classes}, but source {data.source} has {count}; correct it or "
            "leave it out"
        )
    return found
