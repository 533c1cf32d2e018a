"""Adaptive average pooling whose gradient is the same in every run."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled_to(x: Tensor, height: int, width: int) -> Tensor:
    """adaptive_avg_pool2d of x (N, C, H, W), whose own gradient on a GPU is not reproducible."""
    if x.shape[2] % height == 0 and x.shape[3] % width == 0:
        factors = x.shape[2] // height, x.shape[3] // width
        return x if factors == (1, 1) else F.avg_pool2d(x, factors)
    for axis, side in ((2, height), (3, width)):
        n = x.shape[axis]
        bins = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
        x = torch.stack([x.narrow(axis, a, b - a).mean(axis) for a, b in bins], axis)
    return x
