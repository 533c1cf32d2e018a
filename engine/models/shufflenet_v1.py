"""ShuffleNet (3 groups) for 32 x 32 images with the parameter names of the published students.

Zhang et al., "ShuffleNet", but with a 1 x 1 stem that keeps the size, a ReLU behind the depthwise
convolution, and narrow layers of a quarter of the channels that a block computes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import relu_points

_STEM = 24
_STAGES = ((240, 4), (480, 8), (960, 4))  # channels and blocks; the first block halves the size


class Block(nn.Module):
    """A grouped bottleneck; with `halve`, its output is joined to its pooled input, else added.

    The channels of the narrow part are a quarter of what the convolutions return.
    """

    def __init__(self, channels_in: int, channels: int, groups_in: int, halve: bool) -> None:
        super().__init__()
        added = channels - channels_in if halve else channels
        narrow = added // 4
        stride = 2 if halve else 1
        self.conv1 = nn.Conv2d(channels_in, narrow, 1, groups=groups_in, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(groups_in)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, groups=narrow, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(narrow, added, 1, groups=3, bias=False)
        self.bn3 = nn.BatchNorm2d(added)
        self.relu3 = nn.ReLU()
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if halve else None

    def forward(self, x: Tensor) -> Tensor:  # (N, channels_in, H, W)
        out = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        joined = out + x if self.pool is None else torch.cat([out, self.pool(x)], 1)
        return self.relu3(joined)  # (N, channels, H, W) or (N, channels, H / 2, W / 2)


class ShuffleNetV1(nn.Module):
    """A 1 x 1 stem, three stages of 4, 8 and 4 blocks, average pooling, one linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        (first, _), (second, _), (third, _) = _STAGES
        # The stem's channels are too few to be grouped.
        self.layer1 = _stage(_STEM, *_STAGES[0], groups_in=1)
        self.layer2 = _stage(first, *_STAGES[1], groups_in=3)
        self.layer3 = _stage(second, *_STAGES[2], groups_in=3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(third, num_classes)

    @property
    def taps(self) -> dict[str, str]:
        """Where the features are: name to module path; ":in" behind it means the module's input."""
        ends = [f"layer{i}.{blocks - 1}.relu3" for i, (_, blocks) in enumerate(_STAGES, 1)]
        return {**relu_points("relu", *ends), "pooled": "pool", "classifier": "linear"}

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))  # (N, num_classes)


def _stage(channels_in: int, channels: int, blocks: int, groups_in: int) -> nn.Sequential:
    rest = [Block(channels, channels, 3, halve=False) for _ in range(blocks - 1)]
    return nn.Sequential(Block(channels_in, channels, groups_in, halve=True), *rest)
