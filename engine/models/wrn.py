"""Wide ResNets for 32 x 32 images with the parameter names of the published teachers.

Zagoruyko and Komodakis, "Wide Residual Networks", without dropout: BatchNorm and ReLU stand before
each convolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from .parts import he_fan_out


class Block(nn.Module):
    """BatchNorm, ReLU and a 3 x 3 convolution, twice, and a shortcut; linear at its end.

    Where the channels change, the shortcut starts behind the first ReLU and is a convolution.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if channels_in != channels:
            self.convShortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels_in, H, W)
        active = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        x = self.relu2(self.bn2(self.conv1(active)))
        return self.conv2(x) + shortcut  # (N, channels, H / stride, W / stride)


class Stage(nn.Module):
    """Blocks in a row, one level deeper in the state dict than in the other ResNets."""

    def __init__(self, channels_in: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = [Block(channels, channels, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(Block(channels_in, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`; `depth` is 6 n + 4 for n blocks a stage."""

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: {depth} is not 6 n + 4 with n >= 1")
        blocks = (depth - 4) // 6
        first, second, third = 16 * widen, 32 * widen, 64 * widen
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, first, blocks, stride=1)
        self.block2 = Stage(first, second, blocks, stride=2)
        self.block3 = Stage(second, third, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(third)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        he_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    @property
    def taps(self) -> dict[str, str]:
        """Where the features are: name to module path.

        A stage is the sum that its last block returns, before any BatchNorm and ReLU; its ".pre"
        is what the BatchNorm behind it makes of that sum: the next stage's first, or the last of
        all. The stem is a convolution alone. These are the published features, whose code calls
        those BatchNorms once more to get them and so also updates their statistics twice; here
        they are read where they arise.
        """
        return {
            "stem": "conv1",
            "stage1": "block1",
            "stage1.pre": "block2.layer.0.bn1",
            "stage2": "block2",
            "stage2.pre": "block3.layer.0.bn1",
            "stage3": "block3",
            "stage3.pre": "bn1",
            "pooled": "pool",
            "classifier": "fc",
        }

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        return self.fc(self.pool(x).flatten(1))  # (N, num_classes)
