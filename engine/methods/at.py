"""Attention transfer (Zagoruyko and Komodakis 2017): where a network looks, stage by stage."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from .method import Outputs, Terms
from .parts.maps import MapMethod


class AT(MapMethod):
    """sum over stages of the mean over images and places of (Q_S - Q_T)^2.

    Q (N, H * W) is the mean over channels of |F|^power, divided by its L2 norm for each image. The
    larger map is pooled to the smaller before. Weight as in RepDistiller and mdistiller.
    """

    name: Literal["at"] = "at"

    feature_weight: float = Field(1000.0, ge=0, description="weight of the feature loss")
    power: float = Field(2.0, ge=1, description="p of |F|^p")

    def features(self, out: Outputs, target: Tensor) -> Terms:
        losses = [F.mse_loss(self._attention(s), self._attention(t)) for s, t in self.pairs(out)]
        return {"at": torch.stack(losses).sum()}

    def _attention(self, maps: Tensor) -> Tensor:  # (N, C, H, W)
        return F.normalize(maps.abs().pow(self.power).mean(1).flatten(1))
