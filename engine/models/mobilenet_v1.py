"""MobileNetV1 for ImageNet, laid out as the published distillation students.

Howard et al., "MobileNets", table 1.
"""

from __future__ import annotations

from torch import Tensor, nn

from .parts import conv_bn_relu, relu_points

# Output channels and stride of the depthwise-separable convolutions behind the stem.
_SEPARABLE = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


class MobileNetV1(nn.Module):
    """A strided 3 x 3 stem, 13 depthwise-separable convolutions, average pooling, one linear layer.

    torchvision has no such network. Published for images of 224 x 224; other sizes work.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 32
        layers: list[nn.Module] = [nn.Sequential(*conv_bn_relu(3, channels, 3, stride=2))]
        for wider, stride in _SEPARABLE:
            depthwise = conv_bn_relu(channels, channels, 3, stride=stride, groups=channels)
            layers.append(nn.Sequential(*depthwise, *conv_bn_relu(channels, wider, 1)))
            channels = wider
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(channels, num_classes)

    @property
    def taps(self) -> dict[str, str]:
        """Where the features are: name to module path; ":in" behind it means the module's input.

        A stage is the last layer before the size halves, as in the published features.
        """
        points = relu_points("model.0.2", *(f"model.{i}.5" for i in (3, 5, 11, 13)))
        return {**points, "pooled": "model.14", "classifier": "fc"}

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        return self.fc(self.model(x).flatten(1))  # (N, num_classes)
