"""The networks by name, with random weights or those of a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from . import torchvision_models
from .checkpoints import load_weights
from .cifar_resnet import NARROW, WIDE, CifarResNet
from .fold import FoldError, fold_batchnorm
from .taps import Taps, Until, points, shapes, stages, unreached

__all__ = [
    "NETWORKS",
    "FoldError",
    "Taps",
    "Until",
    "create",
    "fold_batchnorm",
    "points",
    "shapes",
    "stages",
    "unreached",
]

# Each makes the network for a number of classes.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": partial(CifarResNet, 8, NARROW),
    "resnet14": partial(CifarResNet, 14, NARROW),
    "resnet20": partial(CifarResNet, 20, NARROW),
    "resnet32": partial(CifarResNet, 32, NARROW),
    "resnet44": partial(CifarResNet, 44, NARROW),
    "resnet56": partial(CifarResNet, 56, NARROW),
    "resnet110": partial(CifarResNet, 110, NARROW),
    "resnet8x4": partial(CifarResNet, 8, WIDE),
    "resnet32x4": partial(CifarResNet, 32, WIDE),
}

_PREFIX = "torchvision:"


def create(name: str, num_classes: int, checkpoint: str | Path | None = None) -> nn.Module:
    """The network `name`: images (N, 3, H, W) of a float type in, logits (N, num_classes) out.

    `name` is a key of NETWORKS or "torchvision:" and one of torchvision's classifiers. The
    weights are random, or those of `checkpoint`: a file (also a published teacher's), a
    checkpoint folder of a run, or a run's folder, which stands for its best checkpoint.
    Raises ValueError for an unknown name, fewer than two classes, or a checkpoint that does not
    fit, FileNotFoundError when there is none.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: {num_classes}; a classifier needs at least 2")
    builders = NETWORKS | _torchvision(torchvision_models.names())
    if name not in builders:
        raise ValueError(_unknown(name, list(builders)))
    model = builders[name](num_classes)
    if checkpoint is not None:
        residual = [n for n in torchvision_models.names() if "resn" in n]  # resnet*, resnext*
        known = NETWORKS | _torchvision(residual)
        load_weights(model, checkpoint, name=name, num_classes=num_classes, known=known)
    return model


def _torchvision(names: list[str]) -> dict[str, Callable[[int], nn.Module]]:
    return {_PREFIX + name: partial(torchvision_models.build, name) for name in names}


def _unknown(name: str, known: list[str]) -> str:
    if name.removeprefix(_PREFIX) in torchvision_models.AUXILIARY:
        return f"name: {name} has auxiliary outputs while training, which no method here reads"
    near = difflib.get_close_matches(name, known, n=3)
    if _PREFIX + name in known:
        near = [_PREFIX + name, *near[:2]]
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    return (
        f"name: {name!r} is no known network{hint} Known: {', '.join(NETWORKS)}, torchvision:NAME"
    )
