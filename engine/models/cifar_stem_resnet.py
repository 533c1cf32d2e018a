"""ResNet-18, 34 and 50 with a stem for 32 x 32 images, laid out as the published teachers.

He et al., "Deep Residual Learning for Image Recognition", table 1, but for the stem: one 3 x 3
convolution, no pooling.
"""

from __future__ import annotations

from torch import Tensor, nn

from .parts import he_fan_out, relu_points


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, ReLU after the addition."""

    expansion = 1
    last_relu = "relu2"

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.shortcut = _shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels_in, H, W)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu2(x + shortcut)  # (N, channels, H / stride, W / stride)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (which strides) and 1 x 1 convolutions and a shortcut, then ReLU."""

    expansion = 4
    last_relu = "relu3"

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = self.expansion * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu3 = nn.ReLU()
        self.shortcut = _shortcut(channels_in, wide, stride)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels_in, H, W)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu3(x + shortcut)  # (N, 4 * channels, H / stride, W / stride)


class CifarStemResNet(nn.Module):
    """Four stages of `blocks` blocks with 64, 128, 256 and 512 channels times the expansion."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int,
    ) -> None:
        super().__init__()
        wide = block.expansion
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, 64 * wide, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 128 * wide, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 256 * wide, 512, blocks[3], stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512 * wide, num_classes)
        self._last = [f"layer{i}.{n - 1}.{block.last_relu}" for i, n in enumerate(blocks, 1)]
        he_fan_out(self)

    @property
    def taps(self) -> dict[str, str]:
        """Where the features are: name to module path; ":in" behind it means the module's input."""
        return {**relu_points("relu", *self._last), "pooled": "pool", "classifier": "linear"}

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.pool(x).flatten(1))  # (N, num_classes)


def _shortcut(channels_in: int, channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels_in == channels:
        return None
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
    )


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    channels_in: int,
    channels: int,
    blocks: int,
    stride: int,
) -> nn.Sequential:
    rest = [block(channels * block.expansion, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(channels_in, channels, stride), *rest)
