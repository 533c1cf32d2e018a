"""Neuron selectivity transfer (Huang and Wang 2017): the distribution of the channels' patterns."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .method import Outputs, Terms
from .parts.maps import MapMethod


class NST(MapMethod):
    """sum over stages of the squared maximum mean discrepancy with the kernel <a, b>^2.

    mean k(T, T) + mean k(S, S) - 2 mean k(S, T), each mean over the images and over the pairs of
    channels a, b (H * W), which are divided by their L2 norms. The larger map is pooled to the
    smaller before. Weight as in RepDistiller and mdistiller.
    """

    name: Literal["nst"] = "nst"

    feature_weight: float = Field(50.0, ge=0, description="weight of the feature loss")

    def features(self, out: Outputs, target: Tensor) -> Terms:
        losses = [
            discrepancy(F.normalize(s.flatten(2), dim=2), F.normalize(t.flatten(2), dim=2))
            for s, t in self.pairs(out)
        ]
        return {"nst": torch.stack(losses).sum()}


def discrepancy(student: Tensor, teacher: Tensor) -> Tensor:  # (N, C_S, P), (N, C_T, P)
    """The mean over N, from products of channels or, where that is less work, of places.

    With A = S^T S / C_S and B = T^T T / C_T, both (N, P, P), it is the squared distance of A and B.
    """
    (_, c_s, places), c_t = student.shape, teacher.shape[1]
    if places * (c_s + c_t) <= c_s**2 + c_s * c_t + c_t**2:
        difference = student.mT @ student / c_s - teacher.mT @ teacher / c_t
        return difference.square().sum((1, 2)).mean()
    return kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).square().mean()
