"""The networks by name, with random weights or those of a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from ..recipe import registered
from . import timm_models, torchvision_models
from .cifar_resnet import DOUBLE, NARROW, WIDE, CifarResNet
from .cifar_stem_resnet import BasicBlock, Bottleneck, CifarStemResNet
from .dirac import fold_dirac
from .fold import FoldError, cast_weights, fold_batchnorm
from .mobilenet_v1 import MobileNetV1
from .mobilenet_v2 import MobileNetV2
from .plain import PLAIN
from .shufflenet_v1 import ShuffleNetV1
from .shufflenet_v2 import X1_0, X1_5, ShuffleNetV2
from .taps import Taps, Until, points, shapes, unreached
from .vgg import VGG
from .weights import Match, load_weights
from .wrn import WideResNet

__all__ = [
    "HANDED",
    "NETWORKS",
    "OWN",
    "FoldError",
    "Taps",
    "Until",
    "cast_weights",
    "create",
    "fold_batchnorm",
    "fold_dirac",
    "maker",
    "points",
    "shapes",
    "unreached",
]

# Each makes the network for a number of classes.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": partial(CifarResNet, 8, NARROW),
    "resnet14": partial(CifarResNet, 14, NARROW),
    "resnet20": partial(CifarResNet, 20, NARROW),
    "resnet32": partial(CifarResNet, 32, NARROW),
    "resnet38": partial(CifarResNet, 38, NARROW),
    "resnet44": partial(CifarResNet, 44, NARROW),
    "resnet56": partial(CifarResNet, 56, NARROW),
    "resnet110": partial(CifarResNet, 110, NARROW),
    "resnet116": partial(CifarResNet, 116, NARROW),
    "resnet14x2": partial(CifarResNet, 14, DOUBLE),
    "resnet38x2": partial(CifarResNet, 38, DOUBLE),
    "resnet110x2": partial(CifarResNet, 110, DOUBLE),
    "resnet8x4": partial(CifarResNet, 8, WIDE),
    "resnet32x4": partial(CifarResNet, 32, WIDE),
    "resnet38x4": partial(CifarResNet, 38, WIDE),
    "ResNet18": partial(CifarStemResNet, BasicBlock, (2, 2, 2, 2)),
    "ResNet34": partial(CifarStemResNet, BasicBlock, (3, 4, 6, 3)),
    "ResNet50": partial(CifarStemResNet, Bottleneck, (3, 4, 6, 3)),
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "MobileNetV1": MobileNetV1,
    "MobileNetV2": partial(MobileNetV2, 0.5),
    "MobileNetV2_1_0": partial(MobileNetV2, 1.0),
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": partial(ShuffleNetV2, X1_0),
    "ShuffleV2_1_5": partial(ShuffleNetV2, X1_5),
    **PLAIN,
}

# Networks that a program handed over as objects, by names own:NAME, while its run is at work.
HANDED: dict[str, Callable[[int], nn.Module]] = {}
OWN = "own:"

_PREFIX = "torchvision:"
_TIMM = "timm:"


def create(
    name: str, num_classes: int, checkpoint: str | Path | None = None, match: Match = "names"
) -> nn.Module:
    """The network `name`: images (N, 3, H, W) of a float type in, logits (N, num_classes) out.

    `name` is a key of NETWORKS, a registered name, "torchvision:" and one of torchvision's
    classifiers, or "timm:" and one of timm's models. The weights are random, or those of
    `checkpoint`: a file (also a published teacher's), a checkpoint folder of a run, or a run's
    folder, which stands for its best checkpoint; its tensors are taken by their names or, with
    `match` "order", where names do not fit, by order and shape. Raises ValueError for an unknown
    name, fewer than two classes, or a checkpoint that does not fit, FileNotFoundError when there is
    none.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: {num_classes}; a classifier needs at least 2")
    model = maker(name)(num_classes)
    if not isinstance(model, nn.Module):
        if name.startswith(OWN):
            raise ValueError(
                f"{name.split(':')[1]}: its function gave {_kind(model)}, wants an nn.Module; let "
                "it return the network"
            )
        raise ValueError(f"name: {name} made {_kind(model)}, wants an nn.Module")
    if checkpoint is not None:
        residual = [n for n in torchvision_models.names() if "resn" in n]  # resnet*, resnext*
        # Where networks share a layout, the one with the more usual name is named.
        known = (
            {n: NETWORKS[n] for n in NETWORKS if n not in PLAIN} | _torchvision(residual) | PLAIN
        )
        load_weights(
            model, checkpoint, name=name, num_classes=num_classes, known=known, match=match
        )
    return model


def maker(name: str) -> Callable[[int], nn.Module]:
    """What makes the network `name` with random weights for a number of classes. ValueError for an
    unknown name."""
    if name.startswith(_TIMM):
        return timm_models.maker(name.removeprefix(_TIMM))
    if name.startswith(OWN):
        if name not in HANDED:
            raise ValueError(
                f"name: {name} is an object of the program that called kdfuse.engine.distill; only "
                "that program can make it"
            )
        return HANDED[name]
    own = NETWORKS | registered.NETWORKS
    builders = own if name in own else own | _torchvision(torchvision_models.names())
    if name not in builders:
        raise ValueError(_unknown(name, list(builders)))
    return builders[name]


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _torchvision(names: list[str]) -> dict[str, Callable[[int], nn.Module]]:
    return {_PREFIX + name: partial(torchvision_models.build, name) for name in names}


def _unknown(name: str, known: list[str]) -> str:
    if name.removeprefix(_PREFIX) in torchvision_models.AUXILIARY:
        return f"name: {name} has auxiliary outputs while training, which no method here reads"
    near = difflib.get_close_matches(name, known, n=3)
    if _PREFIX + name in known:
        near = [_PREFIX + name, *near[:2]]
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    own = [known for known in NETWORKS if known not in PLAIN] + list(registered.NETWORKS)
    return (
        f"name: {name!r} is no known network{hint} Known: {', '.join(own)}, plain18, plain34, "
        f"plain50 and their kin (engine/models/plain.py), {_PREFIX}NAME, {_TIMM}NAME, and what "
        "--import MODULE brings"
    )
