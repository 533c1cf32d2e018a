"""Probabilistic knowledge transfer (Passalis and Tefas 2018): how likely images are neighbours."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .method import Outputs, Terms
from .parts.relations import RelationMethod

EPS = 1e-7  # as released: beside each norm and each probability


class PKT(RelationMethod):
    """mean over B x B of P_T log(P_T / P_S), P = (1 + cosine) / 2 with each row divided by its sum.

    The cosines are between the pooled features of B images. Weight as in RepDistiller and
    mdistiller. B is the batch of a process unless `gather` is set.
    """

    name: Literal["pkt"] = "pkt"
    default_taps: ClassVar[str] = "pooled"

    feature_weight: float = Field(30000.0, ge=0, description="weight of the feature loss")

    def features(self, out: Outputs, target: Tensor) -> Terms:
        losses = []
        for student, teacher in self.pairs(out):
            p, q = neighbours(teacher), neighbours(student)
            losses.append((p * ((p + EPS) / (q + EPS)).log()).mean())
        return {"pkt": torch.stack(losses).sum()}


def neighbours(rows: Tensor) -> Tensor:  # (B, d)
    unit = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + EPS)
    near = (1 + unit @ unit.T) / 2
    return near / near.sum(1, keepdim=True)  # (B, B)
