"""The convolution that VGG and the MobileNets repeat."""

from __future__ import annotations

from torch import nn


def conv_bn_relu(
    channels_in: int,
    channels: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> list[nn.Module]:
    """A convolution that keeps the size at stride 1, its BatchNorm and a ReLU, in this order."""
    conv = nn.Conv2d(
        channels_in, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=bias
    )
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]
