"""Weights under the names that timm and torchvision give them, where a network is one of theirs.

Equal names and shapes, or an equal order, do not say that the same is computed: `check.py` runs
the library's own network with what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models import torchvision_models
from ..models.matching import in_order

LAYOUTS = ("timm", "torchvision")


@dataclass(frozen=True)
class Twin:
    """A network of a library."""

    library: str  # one of LAYOUTS
    name: str
    options: Mapping[str, str] = field(default_factory=dict)  # of timm's create_model

    def make(self, classes: int) -> nn.Module:
        """The library's own, with random weights."""
        if self.library == "timm":
            import timm

            options: dict[str, Any] = {"num_classes": classes, **self.options}
            return timm.create_model(self.name, **options)
        import torchvision.models

        return torchvision.models.get_model(self.name, weights=None, num_classes=classes)


# Networks that the other library has under another name, with the same tensors in the same order.
OTHERWISE = {
    "torchvision:mobilenet_v2": Twin("timm", "mobilenetv2_100"),
    "timm:mobilenetv2_100": Twin("torchvision", "mobilenet_v2"),
    # Published with ReLU, as here; timm's own has ReLU6.
    "MobileNetV1": Twin("timm", "mobilenetv1_100", {"act_layer": "relu"}),
}
SHARED = "resnet*, resnext*, wide_resnet* and densenet*"
FITTING = {
    "timm": f"timm:NAME, torchvision's {SHARED}, torchvision:mobilenet_v2 and MobileNetV1",
    "torchvision": f"torchvision:NAME, timm's {SHARED} of torchvision's names and "
    "timm:mobilenetv2_100",
}


def laid_out(
    name: str, weights: Mapping[str, Tensor], classes: int, layout: str
) -> tuple[Twin, dict[str, Tensor]]:
    """The network of the library `layout` that the network `name` is, and its weights for it.

    Raises ValueError where the library has none, or is not installed.
    """
    library, _, short = name.partition(":")
    if library == layout:
        return Twin(layout, short), dict(weights)
    twin = OTHERWISE.get(name, Twin(layout, short))
    if twin.library == layout and _has(layout, twin.name):
        with torch.device("meta"):  # names and shapes alone
            theirs = twin.make(classes)
        if name in OTHERWISE:
            return twin, {key: weights[own] for key, own in in_order(weights, theirs).items()}
        wanted = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
        if wanted == {key: tensor.shape for key, tensor in weights.items()}:
            return twin, dict(weights)
    raise ValueError(
        f"layout = {layout!r}: {layout} has no network with the weights of {name}; it has those of "
        f"{FITTING[layout]}. Without --layout they keep the names that they have here"
    )


def _has(library: str, name: str) -> bool:
    if library == "torchvision":
        return name in torchvision_models.names()
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"layout = 'timm': needs timm ({error}): pip install timm") from error
    return name in timm.list_models()
