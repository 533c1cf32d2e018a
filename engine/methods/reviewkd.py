"""ReviewKD (Chen et al. 2021): the student's deep features help to make its shallow ones."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Size, Tensor, nn

from .method import Networks, Outputs, Points, Terms
from .parts.feature import FeatureMethod
from .parts.pooling import pooled_to


class ReviewKD(FeatureMethod):
    """CE + feature_weight * sum over levels of HCL(reviewed student feature, teacher's feature).

    Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021. A level is a stage
    or, the deepest, the pooled feature as a map of 1 x 1. The student's are fused from deep to
    shallow (`Review`) and compared at several scales (`hcl`) with the teacher's before the ReLU.
    Defaults are those of the code released for CIFAR; feature_weight is chosen for each pair
    there (5 for resnet8x4, 0.6 for resnet20, 1 for resnet32), and ImageNet has warmup = 1.

    The fusion's BatchNorm has the statistics of each process's own images.
    """

    name: Literal["reviewkd"] = "reviewkd"
    default_taps: ClassVar[str] = "stages.pre"

    warmup: int = Field(
        20, ge=0, description="epochs over which the feature loss grows to full; 0: none"
    )
    student_relu: Literal["before", "after"] = Field(
        "after", description="the student's stages are read before or after their last ReLU"
    )
    max_mid_channels: int = Field(
        512,
        ge=1,
        description="channels inside the fusion, but never more than the student's deepest level "
        "has; 512 in the released code, also where its configurations say otherwise",
    )

    @model_validator(mode="after")
    def _options_have_effect(self) -> ReviewKD:
        if self.student_taps:
            found = self.unused("student_taps", "method", "student_relu")
            if found:
                raise ValueError("\n".join(found))
        return self

    def head(self, networks: Networks) -> Review:
        for role in ("student", "teacher"):
            for tap, shape in networks.shapes[role].items():
                if len(shape) not in (2, 4):
                    raise ValueError(
                        f"method reviewkd reads maps (N, C, H, W) or pooled features (N, C), and "
                        f"the {role}'s {tap} gives {tuple(shape)} for one image; name other points "
                        f"with method.{role}_taps"
                    )
        student, teacher = (list(networks.shapes[role].values()) for role in ("student", "teacher"))
        return Review(student, teacher, self.max_mid_channels)

    def features(self, out: Outputs, target: Tensor) -> Terms:
        values = [
            hcl(out.head[f"reviewed{i}"].float(), _map(teacher))
            for i, (_, teacher) in enumerate(self.pairs(out))
        ]
        return {"reviewkd": torch.stack(values).sum()}

    def schedule(self, epoch: float) -> dict[str, float]:
        """The share of the feature loss: a step a whole epoch, as published."""
        if self.warmup == 0:
            return {}
        return {"share": min((math.floor(epoch) + 1) / self.warmup, 1.0)}

    def _published(self, role: str, points: Points) -> tuple[str, ...]:
        after = role == "student" and self.student_relu == "after"
        stages = self._named("stages" if after else self.default_taps, role, points)
        return stages + self._named("pooled", role, points)


class Review(nn.Module):
    """The student's levels, shallow to deep, each fused with all deeper ones."""

    def __init__(self, student: list[Size], teacher: list[Size], max_mid: int) -> None:
        super().__init__()
        mid = min(max_mid, student[-1][1])
        last = len(student) - 1
        self.levels = nn.ModuleList(
            Fusion(ours[1], mid, theirs[1], (*theirs[2:], 1, 1)[:2], fuses=i < last)
            for i, (ours, theirs) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        deeper: Tensor | None = None
        taps = list(out.student_taps.values())
        for i in reversed(range(len(taps))):
            made[f"reviewed{i}"], deeper = self.levels[i](_map(taps[i]), deeper)
        return made


class Fusion(nn.Module):
    """The paper's attention-based fusion (ABF) of one level with what came from the deeper ones.

    Takes the student's (N, Cs, H, W) and the deeper (N, mid, h, w), None for the deepest level;
    gives the teacher's shape (N, Ct, *size), and (N, mid, *size) for the next shallower level.
    """

    def __init__(
        self, channels_in: int, mid: int, channels: int, size: tuple[int, int], fuses: bool
    ) -> None:
        super().__init__()
        self.size = size
        self.conv1 = _conv_bn(channels_in, mid, 1)
        self.attention = nn.Conv2d(2 * mid, 2, 1) if fuses else None
        self.conv2 = _conv_bn(mid, channels, 3)

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.conv1(x)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            share = self.attention(torch.cat([x, deeper], 1)).sigmoid()
            x = x * share[:, :1] + deeper * share[:, 1:]
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="nearest")
        return self.conv2(x), x


def _conv_bn(channels_in: int, channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """The paper's hierarchical context loss of two maps (N, C, H, W); 0-dim.

    The mean squared difference of the maps, and with weights 1/2, 1/4 and 1/8 of the maps pooled
    to sides 4, 2 and 1, over the sum of the weights; sides that are not below H are left out and
    the weights move up.
    """
    difference = student - teacher  # pooling is linear
    total, weight, weights = difference.square().mean(), 1.0, 1.0
    for side in (4, 2, 1):
        if side < difference.shape[2]:
            weight /= 2
            total = total + weight * pooled_to(difference, side, side).square().mean()
            weights += weight
    return total / weights


def _map(feature: Tensor) -> Tensor:
    """A pooled feature (N, C) as a map (N, C, 1, 1)."""
    return feature if feature.dim() == 4 else feature[:, :, None, None]
