"""The first weights of the published networks, where they are not PyTorch's own."""

from __future__ import annotations

from torch import nn


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
