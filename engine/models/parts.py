"""What several of the published families share: a convolution, first weights, tap points."""

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


def he_fan_out(model: nn.Module) -> None:
    """Draw every convolution's weights with variance 2 / (kernel area * output channels).

    He et al., "Delving Deep into Rectifiers", section 2.2, on the backward pass. As in the
    published code, the groups of a depthwise convolution do not count.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_classifier(classifier: nn.Linear) -> None:
    """Draw a classifier's weights with standard deviation 0.01, its biases 0."""
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)


def relu_points(stem: str, *stages: str) -> dict[str, str]:
    """Outputs ("stem", "stage1", ...) and inputs ("stem.pre", ...) of the ReLUs at these paths."""
    names = ["stem", *(f"stage{i}" for i in range(1, len(stages) + 1))]
    points = {}
    for name, path in zip(names, (stem, *stages), strict=True):
        points[name] = path
        points[f"{name}.pre"] = f"{path}:in"
    return points
