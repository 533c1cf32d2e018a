"""Those that take turns in the benchmark of the input path: the engine's loaders and their peer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from ...data.batch import Batch
from ...data.contents import Encoded, Files
from ...data.loaders import CPU, LOADERS, make_loader
from ...data.manifest import Manifest
from ...data.plan import Ints
from ...data.sources.splits import Split, root_of
from ...recipe.data import Data
from .plain import DECODE, eval_transform, plain_loader, train_transform

Mode = Literal["train", "eval"]
SPLITS: dict[Mode, Split] = {"train": "train", "eval": "val"}
PEER = "ImageFolder"
STEPS = 256  # the least that an epoch has; more than once over a set of few images


class Turn(Protocol):
    """What takes a turn; `burst` batches come at a time, `ahead` are under way."""

    burst: int
    ahead: int

    def batches(self) -> Generator[int, None, None]:
        """The number of images in each batch, without end; its work ends when it is closed."""


class Side(Turn, Protocol):
    """A loader that takes turns with others."""

    name: str
    decode: str

    def close(self) -> None: ...


class Ours:
    """A loader of the engine, for a run on `device`."""

    burst = 1

    def __init__(
        self, manifest: Manifest, data: Data, batch: int, mode: Mode, device: torch.device = CPU
    ) -> None:
        train = mode == "train"
        self._loader = make_loader(manifest, data, batch, seed=0, train=train, device=device)
        self._epochs = count()
        self.name, self.decode = self._loader.name, self._loader.decode
        self.ahead = data.prefetch

    def taken(self) -> Generator[Batch, None, None]:
        """Its batches, epoch after epoch."""
        while True:
            yield from self._loader.epoch(next(self._epochs))

    def batches(self) -> Generator[int, None, None]:
        for batch in self.taken():
            yield batch.valid

    def close(self) -> None:
        self._loader.close()


class Peer:
    """ImageFolder in a DataLoader, which prepares batches in several processes at once."""

    name, decode = PEER, DECODE

    def __init__(self, loader: DataLoader[Any], workers: int) -> None:
        self._loader = loader
        self.burst = self.ahead = workers

    def batches(self) -> Generator[int, None, None]:
        for images, _ in self._loader:
            yield len(images)

    def close(self) -> None:
        """Its processes end with the iterator."""


def chosen_rows(manifest: Manifest, rows: Ints) -> Manifest:
    """A manifest of these rows alone, in this order, each as often as it is named."""
    content = manifest.content
    assert isinstance(content, Encoded)
    lengths = content.lengths[rows]
    made: Encoded
    if isinstance(content, Files):
        made = Files([content.paths[row] for row in rows], lengths)
    else:
        names = [content.names[row] for row in rows]
        tar, offset = content.tar[rows], content.offset[rows]
        made = replace(content, names=names, tar=tar, offset=offset, lengths=lengths)
    target, sizes = manifest.target[rows], manifest.sizes[rows]
    return replace(manifest, content=made, target=target, sizes=sizes, bad={})


def repeated(manifest: Manifest, rows: Ints, batch: int) -> Manifest:
    """A manifest of these rows, as often as an epoch of `STEPS` batches asks for."""
    return chosen_rows(manifest, np.tile(rows, -(-STEPS * batch // len(rows))))


def sides_of(
    manifest: Manifest,
    rows: Ints,
    data: Data,
    batch: int,
    mode: Mode,
    loaders: Sequence[str],
    device: torch.device = CPU,
) -> tuple[list[Side], dict[str, str]]:
    """Those that can read the images, the peer first, and why the others cannot."""
    sides: list[Side] = []
    lost: dict[str, str] = {}
    if mode == "train" and data.after_crop:
        lost[PEER] = f"its transforms have no {', no '.join(data.after_crop)}"
    elif isinstance(manifest.content, Files):
        pin = device.type == "cuda"
        sides.append(Peer(peer_loader(manifest, rows, data, batch, mode, pin), data.workers))
    else:
        lost[PEER] = f"it reads a folder of images, data.source={data.source} is none"
    once = long = manifest
    if isinstance(manifest.content, Encoded):
        once, long = chosen_rows(manifest, rows), repeated(manifest, rows, batch)
    for name in (name for name in LOADERS if name in loaders):
        # Resident holds every image, so a repeated one would be held again.
        images = once if name == "resident" else long
        try:
            named = data.model_copy(update={"loader": name})
            sides.append(Ours(images, named, batch, mode, device))
        except ValueError as error:
            lost[name] = str(error)
    return sides, lost


def peer_loader(
    manifest: Manifest, rows: Ints, data: Data, batch: int, mode: Mode, pin: bool = False
) -> DataLoader[Any]:
    """ImageFolder's batches of these rows; the manifest's images are files."""
    content = manifest.content
    assert isinstance(content, Files)
    view: dict[str, Any] = {"resize": data.eval_resize, **data.normalize.model_dump()}
    if mode == "train":
        of_training = ("scale", "ratio", "padding", "flip")
        view |= {name: getattr(data, name) for name in of_training}
        transform = train_transform(data.augment, data.size, **view)
    else:
        transform = eval_transform(data.size, **view)
    return plain_loader(
        str(root_of(data) / SPLITS[mode]),
        [content.paths[row] for row in rows],
        transform,
        batch=batch,
        workers=data.workers,
        prefetch=data.prefetch,
        shuffle=mode == "train",
        pin=pin,
    )
