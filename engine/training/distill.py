"""Distillation of one's own objects: networks and data sets of a program, in one call."""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..data.items import Dataset, Tensors
from ..data.manifest import Manifest
from ..data.sources.handed import HANDED as SETS
from ..data.sources.handed import manifest_of
from ..data.sources.splits import Split
from ..methods import Method
from ..models import HANDED, OWN
from ..recipe.load import Recipe, from_sections
from ..recipe.method import KNOWN
from ..run.folder import Resume
from ..run.past import PastRun, read_run
from . import start
from .build import deployed_by

Maker = Callable[[int], nn.Module]  # of a network for so many classes
PLAIN = 20.0  # above it a value of a float32 image is hardly normalised
SMALL = 64  # pixels of a side up to which images of one size are seen as they are


@dataclass(frozen=True)
class Distilled:
    """A finished run of `distill`; its folder is one as of any recipe."""

    folder: Path
    networks: Mapping[str, Maker]
    classes: list[str]

    @property
    def past(self) -> PastRun:
        """Recipe, environment and log."""
        return read_run(self.folder)

    @property
    def last(self) -> dict[str, Any]:
        """The last epoch's record: top1 and top5 in percent, slt0_top1, the training terms."""
        return self.past.last or {}

    @property
    def best(self) -> dict[str, Any]:
        """The record of the epoch with the highest top-1."""
        return self.past.best or {}

    def network(self, which: Literal["best", "last"] = "best") -> nn.Module:
        """What was trained, on the CPU, in evaluation mode: the student, with what its method
        deploys beside it (SimKD's projector and the teacher's classifier).

        It takes images as the recipe normalises them. Raises CheckpointError where its checkpoint
        is damaged.
        """
        with _handed(self.networks, {}):
            return deployed_by(self.folder, len(self.classes), which)[0].eval()


def distill(
    student: nn.Module | Maker | str,
    teacher: nn.Module | Path | str | None,
    train: Dataset,
    val: Dataset,
    method: str | Mapping[str, Any] | Method = "kd",
    *,
    out: str | Path,
    epochs: int,
    batch: int = 64,
    lr: float = 0.1,
    size: int | None = None,
    classes: Sequence[str] | None = None,
    slt: Maker | str | None = None,
    settings: Iterable[str] = (),
    resume: Resume = "auto",
) -> Distilled:
    """Train a student from a teacher: any modules, on any map-style data sets.

    student: a module, which begins with the weights that it has (the object itself stays as it
        is); a function of the number of classes that makes one; or a network's name, as in recipes
    teacher: a module with its weights; the folder of a run, whose best network it is (Path), if
        that was no object; a network's name, with teacher.checkpoint among the settings; None for
        methods without one
    train, val: items (image, label), labels from 0. Paths and PIL images are decoded,
        cropped and flipped by the plan; tensors (3, side, side) come as they are, in the plan's
        order: uint8 of 0..255 are normalised, float32 are not
    method: a name (`kdfuse.engine.methods.METHODS`), {"name": ..., its options}, or the object
    out: the run's folder
    epochs, batch, lr: passes over train, images of a step, the first learning rate
    size: side of the images that the networks see, pixels; None: that of the images where all of
        train are squares of one size up to 64 (then cropped from a border), else 224
    classes: their names; None: `train.classes`, or numbers
    slt: what self-learning teachers are, where the method trains any: a function of the number of
        classes, or a network's name
    settings: words as on the command line, "optim.schedule=step", "run.speed=exact"; the schedule
        is a cosine otherwise
    resume: "auto" goes on with a run that was stopped and returns one that is finished, of the
        same objects; False wants a new folder, True an old one

    Under torchrun every process makes the same call. What was handed over is not saved: the same
    program has to call again to go on, and weights are to be read from the run's checkpoints.
    Raises what `kdfuse.engine.train` raises, TypeError and ValueError for objects that do not fit.
    """
    sets: dict[Split, Manifest] = {"train": manifest_of(train, "train", classes)}
    sets["val"] = manifest_of(val, "val", sets["train"].classes)
    _check_alike(sets["train"], sets["val"])
    networks: dict[str, Maker] = {}
    raw: dict[str, Any] = {
        "name": "own",
        "method": _method(method),
        "data": _data(sets["train"], size),
        "student": _network("student", student, networks),
        "optim": {"lr": lr, "schedule": "cosine"},
        "run": {"epochs": epochs, "batch": batch},
    }
    if isinstance(teacher, Path):
        raw["teacher"] = {"name": f"run:{teacher}"}
    elif teacher is not None:
        raw["teacher"] = _network("teacher", teacher, networks)
    if slt is not None:
        raw["slt"] = _network("slt", slt, networks)
    recipe = from_sections(raw, settings)
    assert isinstance(recipe, Recipe)
    if recipe.method.slt_count and slt is None and isinstance(teacher, nn.Module):
        raise ValueError(
            f"slt: method {recipe.method.name} trains networks beside the student, which begin "
            "with random weights, and the teacher is an object with its own; give a function that "
            "makes one, as in slt=lambda classes: MyNetwork(classes)"
        )
    with _handed(networks, sets):
        folder = start.train(recipe, out, resume)
    return Distilled(folder, networks, sets["train"].classes)


@contextmanager
def _handed(networks: Mapping[str, Maker], sets: Mapping[Split, Manifest]) -> Iterator[None]:
    """Within, names of recipes stand for these objects."""
    if HANDED or SETS:
        raise RuntimeError("distill is at work in this process; call it again when it has returned")
    HANDED.update(networks)
    SETS.update(sets)
    try:
        yield
    finally:
        HANDED.clear()
        SETS.clear()


def _method(method: str | Mapping[str, Any] | Method) -> dict[str, Any]:
    if isinstance(method, str):
        return {"name": method}
    if isinstance(method, Mapping):
        return dict(method)
    if KNOWN.get(method.name) is not type(method):
        raise ValueError(
            f"method: {type(method).__name__} is not the class that recipes know as {method.name}; "
            "register it first (docs/extending.md)"
        )
    return method.model_dump()


def _network(role: str, given: nn.Module | Maker | str, networks: dict[str, Maker]) -> Any:
    """The section of a network, whose maker is kept in `networks` if it is an object."""
    if isinstance(given, str):
        folder = os.sep in given and ":" not in given
        if role == "teacher" and (folder or Path(given).is_dir()):
            raise ValueError(
                f"teacher: {given!r} is no network's name; a run's folder is handed over as "
                f"Path({given!r})"
            )
        return {"name": given}
    if role == "slt" and isinstance(given, nn.Module):
        raise TypeError(
            f"slt: wants a function of the number of classes, or a network's name, got a module "
            f"({type(given).__name__}), from whose weights all SL-Ts would begin alike; give "
            f"slt=lambda classes: {type(given).__name__}(...)"
        )
    if not callable(given):
        raise TypeError(f"{role}: wants a module, a function that makes one or a name, got {given}")
    if not isinstance(given, nn.Module):
        _check_takes_classes(role, given)
    kind = getattr(given, "__qualname__", type(given).__qualname__)
    name = f"{OWN}{role}:{re.sub(r'[^0-9A-Za-z_.]+', '_', kind)}"
    module = given
    networks[name] = (
        (lambda classes: copy.deepcopy(module)) if isinstance(module, nn.Module) else module
    )
    return {"name": name}


def _check_takes_classes(role: str, maker: Maker) -> None:
    """Raise TypeError for a function that cannot be called with a number of classes."""
    try:
        signature = inspect.signature(maker)
    except ValueError:  # of something built in, which has none
        return
    try:
        signature.bind(2)
    except TypeError as error:
        name = getattr(maker, "__qualname__", type(maker).__qualname__)
        raise TypeError(
            f"{role}: {name}{signature} cannot be called with the number of classes alone "
            f"({error}); give a function of it, as in lambda classes: MyNetwork(classes)"
        ) from error


def _data(train_set: Manifest, size: int | None) -> dict[str, Any]:
    """The section of the data: what is done to images of this kind, unless settings say so."""
    found: dict[str, Any] = {"source": "own", "classes": len(train_set.classes)}
    sizes = train_set.sizes[train_set.sizes.min(1) > 0]  # of those that can be read
    height, width = sizes[0].tolist()
    if isinstance(train_set.content, Tensors):
        if size not in (None, height):
            raise ValueError(f"size: {size}, and the tensors of train are of {height} pixels")
        found |= {"size": height, "augment": "none", "flip": False, "eval_resize": None}
        if train_set.content.dtype == torch.float32:  # (255 x / 255 - 0) / 1
            if (most := train_set.content.item(0).max().item()) > PLAIN:
                print(
                    f"train[0] has values up to {most:g}: float32 images are taken as the networks "
                    "see them; give uint8 for images of 0..255, which are normalised",
                    file=sys.stderr,
                    flush=True,
                )
            found["normalize"] = {"mean": [0.0] * 3, "std": [1 / 255] * 3}
        return found
    one_size = bool((sizes == height).all())
    if one_size and height <= SMALL and size in (None, height):
        return found | {"size": height, "augment": "pad_crop", "eval_resize": None}
    size = 224 if size is None else size
    return found | {"size": size, "eval_resize": round(size * 256 / 224)}


def _check_alike(train_set: Manifest, val_set: Manifest) -> None:
    """Raise ValueError unless both sets are of tensors of one kind, or neither is of tensors."""
    found = [
        (x.content.shape, x.content.dtype) if isinstance(x.content, Tensors) else "pictures"
        for x in (train_set, val_set)
    ]
    if found[0] != found[1]:
        raise ValueError(
            f"val: its images are {found[1]}, and those of train {found[0]}; give both alike"
        )
