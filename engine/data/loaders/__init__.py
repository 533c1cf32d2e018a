"""The loaders by name, and which one a recipe's `auto` stands for."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ...recipe.data import Data
from ..contents import Encoded
from ..items import Tensors
from ..manifest import Manifest
from ..plan import Ints
from ..schedule import Schedule
from .dali import DaliLoader
from .decoding import check_loader
from .items import ItemsLoader
from .nvjpeg import NvjpegLoader
from .resident import ResidentLoader, suits
from .vision import VisionLoader

Loader = DaliLoader | VisionLoader | NvjpegLoader | ResidentLoader | ItemsLoader
LOADERS: dict[str, type[Loader]] = {
    "dali": DaliLoader,
    "torchvision": VisionLoader,
    "resident": ResidentLoader,
}
CPU = torch.device("cpu")


def make_loader(
    manifest: Manifest,
    data: Data,
    batch: int,
    *,
    seed: int,
    train: bool,
    part: range | None = None,
    device: torch.device = CPU,
    views: int | None = None,
    rows: Ints | None = None,
) -> Loader:
    """The loader of `data.loader` for a process that takes the places `part` (None: all) of each
    step of `batch` images. With `rows` an evaluation is of those rows alone.

    `kind_of` says which it is. The loader's `name` says so too, its `decode` where and how it
    decodes, its `mode` in one word. `device` is where the run computes: batches for a GPU lie in
    pinned memory, or on the GPU itself where they are made there (resident, and any with mode
    hybrid or gpu). ValueError where the training set does not fill a step, or where the images or
    this machine are not what `data.loader` or `data.decode` needs; BadImagesError, a RuntimeError,
    for too many unreadable images.
    """
    kind = kind_of(manifest, data, train)
    check_loader(data, kind, device)
    schedule = Schedule(
        manifest, data, batch, seed=seed, train=train, part=part, views=views, rows=rows
    )
    if kind == "items":
        return ItemsLoader(schedule, device)
    if kind == "torchvision" and data.decode == "gpu":
        return NvjpegLoader(schedule, device)
    return LOADERS[kind](schedule, device)


def kind_of(manifest: Manifest, data: Data, train: bool) -> str:
    """The name of the loader of a split: `data.loader`, or what "auto" stands for.

    "auto" is resident for a small set whose images have one size or are seen whole, as in
    evaluation, where nothing is done after the crop and DALI is not asked for (`data.decode`). Else
    dali where it is installed and the images are files or in tars; else torchvision. Items that are
    tensors have a loader of their own.
    """
    if isinstance(manifest.content, Tensors):
        if data.loader != "auto":
            raise ValueError(
                f"data.loader={data.loader} reads pictures, and {manifest.name(0)} is a tensor; "
                "set data.loader=auto"
            )
        return "items"
    if data.loader != "auto":
        return data.loader
    if suits(manifest, data, train):
        return "resident"
    return "dali" if isinstance(manifest.content, Encoded) and _has_dali() else "torchvision"


def _has_dali() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package `nvidia` at all
        return False
