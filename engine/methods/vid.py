"""Variational information distillation (Ahn et al. 2019): the teacher's maps, made likely."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .method import Networks, Outputs, Terms
from .parts.maps import MapMethod, map_shapes, same_size

EPS = 1e-5  # as released: the least variance


class VID(MapMethod):
    """sum over stages of the mean of ((mu(F_S) - F_T)^2 / v + log v) / 2, a variance v a channel.

    mu is three 1 x 1 convolutions with ReLU between them, v = softplus(s) + 1e-5. The larger map is
    pooled to the smaller before. Weight and first variance as in RepDistiller and mdistiller.
    """

    name: Literal["vid"] = "vid"

    variance: Literal["trained", "fixed"] = Field(
        "trained",
        description="trained: as the paper and RepDistiller, which made the published tables; "
        "fixed: it stays at first_variance, as mdistiller's released code has it",
    )
    first_variance: float = Field(5.0, gt=EPS, description="of every channel before training")

    def head(self, networks: Networks) -> nn.Module:
        return Gaussians(
            [(student[1], teacher[1]) for student, teacher in map_shapes(networks)],
            self.first_variance,
            trained=self.variance == "trained",
        )

    def features(self, out: Outputs, target: Tensor) -> Terms:
        losses = []
        for i, (_, teacher) in enumerate(self.pairs(out)):
            mean, variance = out.head[f"mean{i}"].float(), out.head[f"variance{i}"].float()
            variance = variance[:, None, None]
            losses.append((((mean - teacher) ** 2 / variance + variance.log()) / 2).mean())
        return {"vid": torch.stack(losses).sum()}


class Gaussians(nn.Module):
    """For each pair of taps, the mean and variance that the student expects of the teacher."""

    def __init__(
        self, channels: list[tuple[int, int]], first_variance: float, trained: bool
    ) -> None:
        super().__init__()
        self.means = nn.ModuleList(_mean(*pair) for pair in channels)
        above = first_variance - EPS
        scale = above + math.log(-math.expm1(-above))  # softplus(scale) = above
        for i, (_, teacher) in enumerate(channels):
            start = torch.full((teacher,), scale)
            if trained:
                self.register_parameter(f"scale{i}", nn.Parameter(start))
            else:
                self.register_buffer(f"scale{i}", start)

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        made = {}
        maps = zip(out.student_taps.values(), out.teacher_taps.values(), strict=True)
        for i, (mean, pair) in enumerate(zip(self.means, maps, strict=True)):
            made[f"mean{i}"] = mean(same_size(*pair)[0])
            made[f"variance{i}"] = F.softplus(getattr(self, f"scale{i}")) + EPS
        return made


def _mean(student: int, teacher: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(student, teacher, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher, teacher, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(teacher, teacher, 1, bias=False),
    )
