"""torchvision's classifiers by name, always without its weights: a run never downloads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# While training they return a tuple with auxiliary logits instead of one tensor of logits.
AUXILIARY = ("googlenet", "inception_v3")


def names() -> list[str]:
    """The classifiers that `build` can make, without the prefix "torchvision:"."""
    import torchvision.models  # seconds, needed late

    known = torchvision.models.list_models(module=torchvision.models)
    return [name for name in known if name not in AUXILIARY]


def build(name: str, num_classes: int) -> nn.Module:
    """The network `name` (one of `names()`) with random weights and `num_classes` outputs."""
    import torchvision.models

    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size not in (1, (1, 1)):
            network.set_submodule(path, DeterministicPool(module.output_size))
    return network


class DeterministicPool(nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d to (height, width), with a gradient that repeats on a GPU, too.

    torch's own has none there, so that VGG and AlexNet could not be trained deterministically. To
    one pixel it takes a mean, which repeats.
    """

    output_size: tuple[int, int]

    def forward(self, input: Tensor) -> Tensor:
        return _pooled(input, self.output_size)


# A leaf for torch.fx, which cannot follow a branch; torch.compile can, it knows the shapes.
@fx.wrap
def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[2:] == size:  # as of images of 224 x 224
        return x
    return pooled_by_products(x, size) if x.is_cuda else F.adaptive_avg_pool2d(x, size)


def pooled_by_products(x: Tensor, size: tuple[int, int]) -> Tensor:
    """adaptive_avg_pool2d of x (N, C, H, W) as two products with matrices that average.

    In float32 at least, as torch's own sums. Nothing is copied to the device, so nothing waits.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        pooled = _averages(wide, 2, size[0]) @ wide @ _averages(wide, 3, size[1]).T
    return pooled.to(x.dtype)


def _averages(x: Tensor, axis: int, out: int) -> Tensor:
    """(out, n) for the n rows or columns of x: row i has the weights of bin i, equal or 0."""
    n, i = x.shape[axis], torch.arange(out, device=x.device)[:, None]
    start, end = i * n // out, -(-(i + 1) * n // out)
    place = torch.arange(n, device=x.device)
    return ((start <= place) & (place < end)).to(x.dtype) / (end - start)
