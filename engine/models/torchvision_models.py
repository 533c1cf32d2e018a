"""torchvision's classifiers by name, always without its weights: a run never downloads."""

from __future__ import annotations

import torchvision.models
from torch import nn

# While training they return a tuple with auxiliary logits instead of one tensor of logits.
AUXILIARY = ("googlenet", "inception_v3")


def names() -> list[str]:
    """The classifiers that `build` can make, without the prefix "torchvision:"."""
    known = torchvision.models.list_models(module=torchvision.models)
    return [name for name in known if name not in AUXILIARY]


def build(name: str, num_classes: int) -> nn.Module:
    """The network `name` (one of `names()`) with random weights and `num_classes` outputs."""
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
