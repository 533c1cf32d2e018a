"""What is done to a batch on the device: crop, flip, mix, normalise.

A loader that holds whole images crops and flips here, and resizes in `resize.py`; the others do so
while they decode. What is mixed in a step is a hash of (seed, epoch, step), so that a run can stop
and go on anywhere. The images at positions 2k and 2k + 1 of an epoch are mixed with each other:
their order is random, so the pairs are, and any number of processes, each with whole pairs, mixes
the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...recipe.data import Data
from ...recipe.schema import Normalize
from ..plan import MIX, Plan, key, uniforms

BOX = ("top", "left", "bottom", "right")
DRAWS = 5  # which of the two, lambda (2), the box's centre (2)


def crop(images: Tensor, plan: Plan, border: int, size: int) -> Tensor:
    """The planned boxes of size x size, (B, size, size, 3), of images (n, H, W, 3), flips done.

    The images have `border` black pixels on each side, from which the plan does not count.
    """
    side = np.arange(size)
    rows = plan.box[:, :1] + border + side  # (B, size)
    columns = plan.box[:, 1:2] + border + np.where(plan.flip[:, None], side[::-1], side)
    # One copy, and none waits for it: of pageable memory the driver has its own before it returns.
    places = torch.from_numpy(np.concatenate([plan.index[:, None], rows, columns], axis=1))
    at = places.to(images.device, non_blocking=True)
    return images[at[:, :1, None], at[:, 1 : size + 1, None], at[:, None, size + 1 :]]


@dataclass(frozen=True)
class Mix:
    """How the images of a step are mixed with their partners'."""

    own: float  # lambda: the share of a row's own image and label
    box: tuple[int, int, int, int] | None  # CutMix: top, left, bottom, right; mixup: None


class Mixing:
    """Mixes the batches of a run as its recipe says; with all of it off they stay as they are."""

    def __init__(self, data: Data, classes: int, batch: int, seed: int) -> None:
        """`batch`: images of a process. Raises ValueError for an odd number to be mixed."""
        self.data, self.classes, self.seed = data, classes, seed
        self.mixes = data.mixup > 0 or data.cutmix > 0
        if self.mixes and batch % 2:
            raise ValueError(
                f"data.mixup={data.mixup}, data.cutmix={data.cutmix}: images are mixed in pairs, "
                f"and run.batch gives each process {batch} of them; make that even or set both to 0"
            )

    def schedule(self, epoch: int, step: int) -> dict[str, float]:
        """The numbers of a step of an epoch, both 0-based: lambda, and what CutMix pastes."""
        if not self.mixes:
            return {}
        return numbers(draw(self.data, self.seed, epoch, step), self.data)

    def __call__(
        self, now: Mapping[str, Tensor], images: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and labels with the numbers of `schedule`.

        Takes uint8 images and (B,) int64 labels and leaves them as they are. Gives uint8 images,
        or where mixup may be drawn float32 ones of 0..255; and the labels as they were, or (B, C)
        float32 class probabilities. Waits for no device.
        """
        if not self.data.softening:
            return images, target
        soft = soft_labels(target, self.classes, now if self.mixes else None, self.data.smoothing)
        return mix_images(images, now) if self.mixes else images, soft


def numbers(mix: Mix, data: Data) -> dict[str, float]:
    """A mix as the numbers of a step, of the same names in all steps of a run."""
    found = {"own": mix.own, "others": 1 - mix.own}
    if data.cutmix:
        found |= dict(zip(BOX, mix.box or (0, 0, data.size, data.size), strict=True))
    if data.cutmix and data.mixup:  # in the box, which mixup has all over the image
        found["kept"] = 0.0 if mix.box else mix.own
        found["pasted"] = 1 - found["kept"]
    return found


def draw(data: Data, seed: int, epoch: int, step: int) -> Mix:
    """The mix of a step, one for all its rows: a pure function of (seed, epoch, step).

    Lambda is a Beta(alpha, alpha) draw. CutMix (Yun et al., ICCV 2019, "CutMix") pastes a square
    of the share 1 - lambda about a uniform centre, and has the lambda of what of it is inside.
    """
    u = uniforms(key(seed, epoch, MIX), step * DRAWS + np.arange(DRAWS)).tolist()
    cut = data.cutmix > 0 and (data.mixup == 0 or u[0] < 0.5)
    own = symmetric_beta(data.cutmix if cut else data.mixup, u[1], u[2])
    if not cut:
        return Mix(own, None)
    size = data.size
    side = int(size * math.sqrt(1 - own))
    top, left = (int(centre * size) - side // 2 for centre in u[3:])
    bottom, right = min(top + side, size), min(left + side, size)
    top, left = max(top, 0), max(left, 0)
    return Mix(1 - (bottom - top) * (right - left) / size**2, (top, left, bottom, right))


def symmetric_beta(alpha: float, u: float, v: float) -> float:
    """A draw of Beta(alpha, alpha), any alpha > 0, from two uniform draws in [0, 1).

    For t of Student's distribution with 2 alpha degrees of freedom, (1 + t / sqrt(2 alpha + t^2))
    / 2 is such a draw; t is Bailey's (1994, "Polar Generation of Random Variates with the
    t-Distribution"), sqrt(2 alpha (w^-1 - 1)) cos(2 pi v) with w = u^(1 / alpha).
    """
    w = (1 - u) ** (1 / alpha)  # 1 - u is not 0
    c = math.cos(2 * math.pi * v)
    found = (1 + math.sqrt(1 - w) * c / math.sqrt(w + (1 - w) * c * c)) / 2
    return min(max(found, 0.0), 1.0)  # rounding may lead past the ends


def partners(rows: Tensor) -> Tensor:
    """The rows (B, ...), B even, with those of each pair in each other's place."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def mean(own: Tensor, share: Tensor, others: Tensor, rest: Tensor) -> Tensor:
    """share * own + rest * others, float32, the last product not rounded."""
    return torch.addcmul(own * share, others.to(torch.float32), rest)


def mix_images(images: Tensor, now: Mapping[str, Tensor]) -> Tensor:
    """Images (B, 3, H, W) mixed with their partners', in the layout that they have.

    Mixup (Zhang et al., ICLR 2018, "mixup") gives float32: the mean is not rounded, so that it
    equals the mean of the normalised images.
    """
    last = images.permute(0, 2, 3, 1)  # what is stored so is moved so
    others = partners(last)
    if "top" not in now:
        return mean(last, now["own"], others, now["others"]).permute(0, 3, 1, 2)
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    rows = (y >= now["top"]) & (y < now["bottom"])
    box = rows[:, None] & (x >= now["left"]) & (x < now["right"])
    if "kept" in now:
        others = mean(last, now["kept"], others, now["pasted"])
    return torch.where(box[..., None], others, last).permute(0, 3, 1, 2)


def soft_labels(
    target: Tensor, classes: int, now: Mapping[str, Tensor] | None, smoothing: float
) -> Tensor:
    """(B, C) float32 class probabilities of labels (B,): mixed as the images are, then smoothed.

    Smoothing s leaves (1 - s) of them and gives s / C to every class, as
    torch.nn.CrossEntropyLoss(label_smoothing=s) does.
    """
    soft = (target[:, None] == torch.arange(classes, device=target.device)).to(torch.float32)
    if now is not None:
        soft = mean(soft, now["own"], partners(soft), now["others"])
    return soft.mul_(1 - smoothing).add_(smoothing / classes)


class Normalise(nn.Module):
    """Images (N, 3, H, W) of 0..255, uint8 or float32, to (image / 255 - mean) / std.

    The result is a new float32 tensor in the wanted layout.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, statistics: Normalize, channels_last: bool) -> None:
        super().__init__()
        self.statistics = statistics
        mean, std = torch.tensor(statistics.mean), torch.tensor(statistics.std)
        self.register_buffer("scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(3, 1, 1), persistent=False)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, images: Tensor) -> Tensor:
        floats = images.to(torch.float32, memory_format=self.layout, copy=True)
        return floats.mul_(self.scale).add_(self.shift)
