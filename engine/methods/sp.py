"""Similarity-preserving distillation (Tung and Mori 2019): which images look alike to a network."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .method import Outputs, Terms
from .parts.relations import RelationMethod


class SP(RelationMethod):
    """mean over B x B of (G_S - G_T)^2, G = F F^T with each row divided by its L2 norm.

    F (B, d) is the last stage's map of each image, flattened. Weight as in RepDistiller and
    mdistiller. B is the batch of a process unless `gather` is set.
    """

    name: Literal["sp"] = "sp"
    default_taps: ClassVar[str] = "last"

    feature_weight: float = Field(3000.0, ge=0, description="weight of the feature loss")

    def features(self, out: Outputs, target: Tensor) -> Terms:
        losses = [F.mse_loss(similarity(s), similarity(t)) for s, t in self.pairs(out)]
        return {"sp": torch.stack(losses).sum()}


def similarity(rows: Tensor) -> Tensor:  # (B, d)
    return F.normalize(rows @ rows.T)  # (B, B)
