"""Resized crops of a whole batch at once, where its images are.

A crop is resized along its rows and then along its columns. A pixel is the weighted sum of a few
others each time, and these are rows of a table: what `embedding_bag` adds up, on any device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..plan import Plan

DIGIT = 1 << 11  # a weight is a whole number of 1 / DIGIT^2, PIL's precision
PIECE = 1 << 21  # bytes of images that a CPU does at a time: larger pieces leave its caches


def resized_crop(images: Tensor, plan: Plan, size: int) -> Tensor:
    """The planned boxes, each resized to (B, size, size, 3), of images (n, H, W, 3), flips done.

    Bilinear and antialiased, by the integers that PIL computes with, rounded to bytes after each
    pass: every device gives the same, in any batch. Pillow 13 begins with the columns where they
    shrink more, and torch rounds its weights otherwise: a level of 255, in some values. Quickest of
    images whose columns are contiguous. Waits for no device.
    """
    side = np.arange(size)
    columns = np.where(plan.flip[:, None], side[::-1], side)
    numbers = np.concatenate([plan.index[:, None], plan.box, columns], axis=1)
    at = torch.from_numpy(numbers).to(images.device, non_blocking=True)  # one copy, as for `crop`
    taps = max(2, math.ceil(2 * plan.box[:, 2:].max() / size))
    rows = max(1, PIECE // images[0].numel()) if images.device.type == "cpu" else len(at)
    return torch.cat([_resized(images, part, size, taps) for part in at.split(rows)])


def _resized(images: Tensor, at: Tensor, size: int, taps: int) -> Tensor:
    """The crops of a piece; `at` (b, 5 + size): row, top, left, height, width, and columns."""
    index, (top, left, height, width) = at[:, 0], at[:, 1:5, None].unbind(1)
    rows = torch.arange(size, device=at.device)
    lines = images[index].transpose(1, 2)  # (b, W, H, 3)
    across = _sums(lines, *_weights(left, width, at[:, 5:], size, taps))  # (b, size, H, 3)
    down = _sums(across.transpose(1, 2), *_weights(top, height, rows, size, taps))
    return down.to(torch.uint8)


def _weights(
    start: Tensor, length: Tensor, place: Tensor, size: int, taps: int
) -> tuple[Tensor, Tensor]:
    """Which lines make those at `place` (b, size) of the resized ones, and with which weights.

    Both (b, size, taps); weights are float64, in parts of 1 / DIGIT^2. The lines of a crop are
    `length` ones from `start`, both (b, 1); beyond them nothing counts.
    """
    scale = length.double() / size
    reach = scale.clamp(min=1)
    centre = (place + 0.5) * scale
    first = (centre - reach + 0.5).long().clamp(min=0)
    line = first[..., None] + torch.arange(taps, device=start.device)
    away = (line + 0.5 - centre[..., None]).abs() / reach[..., None]
    weight = (1 - away).clamp_(min=0) * (line < length[..., None])
    weight = (weight / weight.sum(dim=2, keepdim=True) * DIGIT**2 + 0.5).floor_()
    return start[..., None] + line.minimum(length[..., None] - 1), weight


def _sums(lines: Tensor, which: Tensor, weight: Tensor) -> Tensor:
    """The weighted sums (b, size, M, 3) of lines (b, L, M, 3) of bytes, rounded; float32.

    The two digits of the weights are added up apart, which float32 does without error for images
    that are made up to 14 times smaller.
    """
    b, count, *line = lines.shape
    table = lines.reshape(b * count, -1).float()
    rows = (which + count * torch.arange(b, device=lines.device)[:, None, None]).flatten(0, 1)
    high = (weight / DIGIT).floor_()
    low = weight - high * DIGIT
    upper, lower = (
        embedding_bag(rows, table, per_sample_weights=digit.float().flatten(0, 1), mode="sum")
        for digit in (high, low)
    )
    carry = lower.add_(DIGIT**2 / 2).mul_(1 / DIGIT).floor_()
    return upper.add_(carry).mul_(1 / DIGIT).floor_().view(b, -1, *line)
