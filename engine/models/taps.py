"""Stage outputs of a network: their names, their channels, and a tap that reads one of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import ResNet

from .cifar_resnet import CifarResNet


def stages(model: nn.Module) -> list[str]:
    """Module paths of the stage outputs of `model`, shallow to deep.

    Raises ValueError for a network whose stages are not known, a folded one among them.
    """
    if isinstance(model, CifarResNet):
        return ["layer1", "layer2", "layer3"]
    if isinstance(model, ResNet):
        return ["layer1", "layer2", "layer3", "layer4"]
    raise ValueError(
        f"model: no stages are known for {type(model).__name__}; a stage output can be read from "
        "the CIFAR ResNets and from torchvision:resnet*, resnext* and wide_resnet*"
    )


def stage_channels(model: nn.Module, stage: str) -> int:
    """Channels of the output of `stage`, one of `stages(model)`. Raises ValueError as it does."""
    block: Any = _blocks(model, stage)[0]
    return (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels


class Tap:
    """Keeps the output of one stage in each forward pass, without running anything twice.

    Make it before the model is compiled; the state dict does not change. Raises ValueError when
    `stage` is not one of `stages(model)`.
    """

    # A layer and no forward hook: torch.compile does not look at hooks when it decides whether a
    # network of the same class can use a graph it already has, and would drop the tap.
    def __init__(self, model: nn.Module, stage: str) -> None:
        self.stage = stage
        self._keep = _Keep()
        _blocks(model, stage).append(self._keep)

    def take(self) -> Tensor:
        """The stage's output (N, channels, H, W) of the last forward pass, with its gradient.

        It is handed over once, so that no graph outlives its step; RuntimeError the second time.
        """
        output, self._keep.output = self._keep.output, None
        if output is None:
            raise RuntimeError(f"tap {self.stage}: no forward pass since the last take()")
        return output


class _Keep(nn.Module):
    """Passes its input through and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.output = x
        return x

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model: no output, since a tensor inside a graph cannot be copied."""
        return super().__getstate__() | {"output": None}


def _blocks(model: nn.Module, stage: str) -> nn.Sequential:
    if stage not in stages(model):
        known = ", ".join(stages(model))
        raise ValueError(f"stage: {stage!r} is not one of {type(model).__name__}'s: {known}")
    blocks = model.get_submodule(stage)
    assert isinstance(blocks, nn.Sequential)
    return blocks
