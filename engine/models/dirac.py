"""Convolutions that start near the identity, which lets deep networks train without shortcuts.

The effective weight of DiracNets (Zagoruyko and Komodakis 2017) is

    alpha[o] * delta[o] + beta[o] * W[o]        for output channel o,

where delta is the weight that passes channel i of its input on as channel i, for i below
min(in, out), and is zero elsewhere. DiracNets divides each W[o] by its Euclidean norm; JointRD
(Li et al. 2020, "Residual Distillation") does not, and allows a stride.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiracConv2d(nn.Conv2d):
    """A convolution without bias whose weight is alpha * delta + beta * W.

    `weight` is W; `alpha` (from 1) and `beta` (from 0.1) are learned, one number for each output
    channel. Where there are more output than input channels, delta has nothing to pass on in the
    rest, and the rest of `alpha` has gradient 0. `normalised` divides each filter of W by its norm.
    """

    # Decay would pull the layer from the identity to zero; both papers' code leaves these out.
    no_weight_decay: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        *,
        normalised: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.normalised = normalised
        self.alpha = nn.Parameter(torch.full((out_channels,), 1.0))
        self.beta = nn.Parameter(torch.full((out_channels,), 0.1))

    def effective_weight(self) -> Tensor:
        """The weight (out, in, height, width) of the ordinary convolution that this one equals."""
        weight = self.weight
        if self.normalised:
            weight = F.normalize(weight.flatten(1)).view_as(weight)
        return torch.addcmul(self._identity(), self.beta[:, None, None, None], weight)

    def _identity(self) -> Tensor:
        """alpha * delta. Padding, and no buffer with delta: that would double the weights."""
        height, width = self.kernel_size
        square = min(self.in_channels, self.out_channels)
        # The centre is at size // 2, as in nn.init.dirac_; F.pad counts from the last dimension.
        around = (width // 2, (width - 1) // 2, height // 2, (height - 1) // 2)
        beyond = (0, self.in_channels - square, 0, self.out_channels - square)
        return F.pad(torch.diag_embed(self.alpha[:square])[:, :, None, None], around + beyond)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.effective_weight(), None, self.stride, self.padding)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", normalised={self.normalised}"


def fold_dirac(model: nn.Module) -> nn.Module:
    """A copy of `model` with an nn.Conv2d of the same outputs for each DiracConv2d.

    For export, and before `fold_batchnorm`. The copy has no alpha and beta; everything else, the
    mode, device and types among it, is as in `model`, which is left as it was.
    """
    folded = copy.deepcopy(model)
    if isinstance(folded, DiracConv2d):
        return _ordinary(folded)
    layers = [
        (path, module)
        for path, module in folded.named_modules(remove_duplicate=False)
        if isinstance(module, DiracConv2d)
    ]
    ordinary = {module: _ordinary(module) for _, module in layers}  # a shared layer stays shared
    for path, module in layers:
        folded.set_submodule(path, ordinary[module])
    return folded


@torch.no_grad()
def dirac_init_(weight: Tensor) -> Tensor:
    """Make `weight` (out, in, height, width), in place, delta + 0.1 * weight, and return it.

    The other reading of a Dirac initialisation: the start is that of a DiracConv2d, the layer
    trained from it an ordinary one. Raises ValueError when `weight` is not 4-dimensional.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight: {tuple(weight.shape)} is not the (out, in, height, width) of 2D")
    height, width = weight.shape[2:]
    weight.mul_(0.1)
    weight[:, :, height // 2, width // 2].diagonal().add_(1)
    return weight


def _ordinary(layer: DiracConv2d) -> nn.Conv2d:
    with torch.device("meta"):  # no random weights: the generator stays where it was
        conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]  # nn.Conv2d's own tuples
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            bias=False,
        )
    with torch.no_grad():
        weight = torch.empty_like(layer.weight).copy_(layer.effective_weight())  # same layout
    conv.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    return conv.train(layer.training)
