"""VGG with BatchNorm for 32 x 32 images, laid out as the published teachers.

Simonyan and Zisserman, "Very Deep Convolutional Networks", table 1, with average pooling and one
linear layer at the end; VGG-8 has one convolution a block.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from .parts import conv_bn_relu, he_fan_out, relu_points, small_classifier


class VGG(nn.Module):
    """Five blocks of `convolutions` 3 x 3 convolutions, halved in size behind the first three."""

    def __init__(self, convolutions: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        self.block0 = _block(3, 64, convolutions[0])
        self.relu0 = nn.ReLU()
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _block(64, 128, convolutions[1])
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(128, 256, convolutions[2])
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _block(256, 512, convolutions[3])
        self.relu3 = nn.ReLU()
        self.block4 = _block(512, 512, convolutions[4])
        self.relu4 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        he_fan_out(self)
        small_classifier(self.classifier)

    @property
    def taps(self) -> dict[str, str]:
        """Where the features are: name to module path; ":in" behind it means the module's input.

        The first block is the stem, as in the published features.
        """
        points = relu_points("relu0", "relu1", "relu2", "relu3", "relu4")
        return {**points, "pooled": "pool", "classifier": "classifier"}

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.pool0(self.relu0(self.block0(images)))
        x = self.pool1(self.relu1(self.block1(x)))
        x = self.pool2(self.relu2(self.block2(x)))
        x = _halve_if_64(self.relu3(self.block3(x)), images)
        x = self.relu4(self.block4(x))
        return self.classifier(self.pool(x).flatten(1))  # (N, num_classes)


# A leaf for torch.fx, which cannot follow a branch; torch.compile can, it knows the shapes.
@fx.wrap
def _halve_if_64(x: Tensor, images: Tensor) -> Tensor:
    """The published networks pool a fourth time for images of 64 rows, and for no other size."""
    return F.max_pool2d(x, 2) if images.shape[2] == 64 else x


def _block(channels_in: int, channels: int, convolutions: int) -> nn.Sequential:
    """Convolutions with BatchNorm and ReLU, but for the last one's ReLU."""
    layers = conv_bn_relu(channels_in, channels, 3, bias=True)
    for _ in range(convolutions - 1):
        layers += conv_bn_relu(channels, channels, 3, bias=True)
    return nn.Sequential(*layers[:-1])
