"""ShuffleNetV2 for 32 x 32 images with the parameter names of the published students.

Ma et al., "ShuffleNet V2", table 5, but for a 1 x 1 stem that keeps the size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

X1_0 = (116, 232, 464, 1024)  # channels of the three stages and of the last convolution
X1_5 = (176, 352, 704, 1024)

_STEM = 24
_BLOCKS = (4, 8, 4)


class Block(nn.Module):
    """Half of the channels pass through three convolutions, then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels, H, W), from a ReLU
        kept, x = x.chunk(2, 1)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn3(self.conv3(self.bn2(self.conv2(x))))
        # The kept half comes from a ReLU and passes a second one unchanged, in values and in
        # gradients. So all channels before the last ReLU are one tensor that can be tapped.
        return self.shuffle(self.relu3(torch.cat([kept, x], 1)))  # (N, channels, H, W)


class Down(nn.Module):
    """The first block of a stage: all channels pass through two branches that halve the size."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(
            channels_in, channels_in, 3, 2, padding=1, groups=channels_in, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv2 = nn.Conv2d(channels_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels_in, H, W)
        left = self.bn1(self.conv1(x))
        left = self.relu2(self.bn2(self.conv2(left)))
        right = self.relu3(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = self.relu5(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat([left, right], 1))  # (N, channels, H / 2, W / 2)


class ShuffleNetV2(nn.Module):
    """A 1 x 1 stem, three stages of 4, 8 and 4 blocks, a 1 x 1 convolution, pooling, one linear.

    `widths` are the channels of the stages and of the last convolution: X1_0 or X1_5.
    """

    def __init__(self, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        first, second, third, last = widths
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = _stage(_STEM, first, _BLOCKS[0])
        self.layer2 = _stage(first, second, _BLOCKS[1])
        self.layer3 = _stage(second, third, _BLOCKS[2])
        self.conv2 = nn.Conv2d(third, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(last, num_classes)

    @property
    def taps(self) -> dict[str, str]:
        """Where the features are: name to module path; ":in" behind it means the module's input.

        As in the published features, a stage's ".pre" has its channels in the order before the
        shuffle, the kept half first, and the last convolution is no stage.
        """
        points = {"stem": "relu", "stem.pre": "relu:in"}
        for i, blocks in enumerate(_BLOCKS, 1):
            points[f"stage{i}"] = f"layer{i}.{blocks - 1}.shuffle"
            points[f"stage{i}.pre"] = f"layer{i}.{blocks - 1}.relu3:in"
        return {**points, "pooled": "pool", "classifier": "linear"}

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.pool(x).flatten(1))  # (N, num_classes)


def _stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
    rest = [Block(channels) for _ in range(blocks - 1)]
    return nn.Sequential(Down(channels_in, channels), *rest)
