"""MobileNetV2 for 32 x 32 images with the parameter names of the published students.

Sandler et al., "MobileNetV2", table 2, but that the blocks of 24 channels do not stride, and that
the first block, which does not widen, keeps its first convolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from .parts import conv_bn_relu, he_fan_out, small_classifier

# Expansion, output channels at width 1, blocks, and stride of the first of them.
_GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow without a ReLU; added to the input where shapes allow."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * channels_in
        self.conv = nn.Sequential(
            *conv_bn_relu(channels_in, wide, 1),
            *conv_bn_relu(wide, wide, 3, stride=stride, groups=wide),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:  # (N, channels_in, H, W)
        out = self.conv(x)
        return x + out if self.residual else out  # (N, channels, H / stride, W / stride)


class MobileNetV2(nn.Module):
    """MobileNetV2 with all channels but the last layer's 1280 times `width`, 0.5 or 1."""

    def __init__(self, width: float, num_classes: int) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn_relu(3, channels, 3, stride=2))
        self.blocks = nn.ModuleList()
        for expansion, full, blocks, stride in _GROUPS:
            wider = int(full * width)
            rest = [InvertedResidual(wider, wider, 1, expansion) for _ in range(blocks - 1)]
            first = InvertedResidual(channels, wider, stride, expansion)
            self.blocks.append(nn.Sequential(first, *rest))
            channels = wider
        self.conv2 = nn.Sequential(*conv_bn_relu(channels, 1280, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        last = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(last)
        he_fan_out(self)
        small_classifier(last)

    @property
    def taps(self) -> dict[str, str]:
        """Where the features are: name to module path; ":in" behind it means the module's input.

        Stages end in linear bottlenecks, so that a stage and its ".pre" are one point.
        """
        points = {"stem": "conv1.2", "stem.pre": "conv1.2:in"}
        for i, group in enumerate((1, 2, 4, 6), 1):
            points[f"stage{i}"] = points[f"stage{i}.pre"] = f"blocks.{group}"
        return {**points, "pooled": "pool", "classifier": "classifier.0"}

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.conv1(x)
        for group in self.blocks:
            x = group(x)
        return self.classifier(self.pool(self.conv2(x)).flatten(1))  # (N, num_classes)
