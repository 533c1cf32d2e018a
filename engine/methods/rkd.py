"""Relational knowledge distillation (Park et al. 2019): distances and angles between images."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .method import Now, Outputs, Terms
from .parts.relations import RelationMethod

EPS = 1e-12  # as released: the least squared distance of two images
ANGLES = 2**24  # that are held at a time


class RKD(RelationMethod):
    """feature_weight * (distance_weight * distance + angle_weight * angle) of the pooled features.

    distance: smooth L1, mean over B x B, of |e_i - e_j| divided by its mean over i != j.
    angle: smooth L1, mean over B x B x B, of the cosine of the angle at i between j and k.
    Weights as in RepDistiller and mdistiller. B is the batch of a process unless `gather` is set.
    """

    name: Literal["rkd"] = "rkd"
    default_taps: ClassVar[str] = "pooled"

    distance_weight: float = Field(25.0, ge=0, description="weight of the distances")
    angle_weight: float = Field(50.0, ge=0, description="weight of the angles")

    def features(self, out: Outputs, target: Tensor) -> Terms:
        distances, angles = [], []
        for student, teacher in self.pairs(out):
            if len(student) < 2:
                raise ValueError(
                    "method rkd compares the images of a batch, and this one has 1; "
                    "raise run.batch, or with several processes set method.gather=true"
                )
            s, t = squared_distances(student), squared_distances(teacher)
            distances.append(F.smooth_l1_loss(relative(s), relative(t)))
            angles.append(angle_loss(s, t))
        return {
            "distance": torch.stack(distances).sum().float(),
            "angle": torch.stack(angles).sum().float(),
        }

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        weights = {"distance": self.distance_weight, "angle": self.angle_weight}
        weighted = {name: weights[name] * value for name, value in out.features.items()}
        total, terms = super().loss(replace(out, features=weighted), target, now)
        return total, {**terms, **{name: v.detach() for name, v in out.features.items()}}


def squared_distances(rows: Tensor) -> Tensor:  # (B, d)
    # A distance from products cancels most of their digits: centred and in float64, what is left
    # is as exact as differences in float32, which would take B x B x d numbers.
    rows = rows.double()
    rows = rows - rows.mean(0)
    square = rows.square().sum(1)
    return (square[:, None] + square - 2 * rows @ rows.T).clamp(min=0) * others(rows)


def others(like: Tensor) -> Tensor:
    """1 for each two images and 0 for one with itself, (B, B)."""
    return 1 - torch.eye(len(like), dtype=like.dtype, device=like.device)


def relative(squared: Tensor) -> Tensor:  # (B, B) squared distances
    """Distances divided by their mean over i != j."""
    count = len(squared)
    distances = squared.clamp(min=EPS).sqrt() * others(squared)
    return distances / (distances.sum() / (count * (count - 1)))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:  # squared distances (B, B), float64
    """The angles of some anchors at a time, made again in the backward pass, from B x B numbers."""
    count = len(student)
    sides = [*in_units(student), *in_units(teacher)]
    step = max(1, ANGLES // count**2)
    total = student.new_zeros(())
    for first in range(0, count, step):
        total = total + checkpoint(
            _angle_part, first, step, *sides, use_reentrant=False, preserve_rng_state=False
        )
    return total / count**3


def in_units(squared: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances in units of their mean, and inverse distances; float32.

    Images in the same place have no direction: their inverse distance is 0, so that the cosines of
    all their angles are 0, as released.
    """
    squared = squared / squared.mean().clamp(min=EPS).detach()
    apart = squared > EPS
    inverse = torch.where(apart, torch.where(apart, squared, 1).rsqrt(), 0)
    return squared.float(), inverse.float()


def _angle_part(
    first: int, step: int, s2: Tensor, s_inverse: Tensor, t2: Tensor, t_inverse: Tensor
) -> Tensor:
    part = slice(first, first + step)
    student, teacher = cosines(s2, s_inverse, part), cosines(t2, t_inverse, part)
    return F.smooth_l1_loss(student, teacher, reduction="sum")


def cosines(squared: Tensor, inverse: Tensor, part: slice) -> Tensor:
    """cos(j, i, k) for the anchors i of a part, (I, B, B), by the law of cosines."""
    sides = squared[part, :, None] + squared[part, None, :] - squared
    return sides * (0.5 * inverse[part, :, None] * inverse[part, None, :])
