"""ResNets for 32 x 32 images with the parameter names and the order of the published teachers."""

from __future__ import annotations

from torch import Tensor, nn

from .parts import he_fan_out, relu_points

NARROW = (16, 16, 32, 64)  # channels of the stem and of the three stages
DOUBLE = (16, 32, 64, 128)  # the stem stays narrow: the widths of a WRN-d-2
WIDE = (32, 64, 128, 256)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, ReLU after the addition."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:  # (N, channels_in, H, W)
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu2(x + shortcut)  # (N, channels, H / stride, W / stride)


class CifarResNet(nn.Module):
    """A ResNet of `depth` layers: a 3 x 3 stem, three stages, average pooling, one linear layer.

    `depth` is 6 n + 2 for n blocks a stage; `widths` are the channels of the stem and the stages.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: {depth} is not 6 n + 2 with n >= 1")
        blocks = (depth - 2) // 6
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        self._last = blocks - 1
        he_fan_out(self)

    @property
    def taps(self) -> dict[str, str]:
        """Where the features are: name to module path; ":in" behind it means the module's input."""
        points = relu_points("relu", *(f"layer{i}.{self._last}.relu2" for i in (1, 2, 3)))
        return {**points, "pooled": "pool", "classifier": "fc"}

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x).flatten(1))  # (N, num_classes)


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [Block(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(channels_in, channels, stride), *rest)
