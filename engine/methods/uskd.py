"""Universal self-knowledge distillation (Yang et al. 2023): labels from the student itself."""

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Size, Tensor, nn

from ...kernels.uskd import uskd_loss
from .method import Method, Networks, Outputs, Points, Role, Terms, with_terms


class WeakHead(nn.Module):
    """Weak logits from a feature map (N, C, H, W) or from tokens (N, L, C): mean and Linear."""

    def __init__(self, shape: Size, classes: int) -> None:
        super().__init__()
        self.places = (2, 3) if len(shape) == 4 else (1,)
        self.classifier = nn.Linear(shape[1] if len(shape) == 4 else shape[-1], classes)

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        (feature,) = out.student_taps.values()
        return {"weak": self.classifier(feature.mean(self.places))}


class USKD(Method):
    """CE, the self-made target and rank labels, and a weak head on the last stage but one."""

    name: Literal["uskd"] = "uskd"
    alpha: float = Field(1.0, ge=0, description="weight of the target term")
    beta: float = Field(0.1, ge=0, description="weight of the non-target term")
    mu: float = Field(0.005, ge=0, description="weight of the weak head's loss")
    rank: Literal["released", "paper"] = Field(
        "released", description="how the non-target classes are ranked"
    )
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    weak_tap: str | None = Field(
        None, description="point or module path that the weak head reads; null: last stage but one"
    )

    def reads(self, points: Mapping[Role, Points]) -> dict[Role, tuple[str, ...]]:
        if self.weak_tap is not None:
            return {"student": (self.weak_tap,)}
        known = [name for name in points["student"] if re.fullmatch(r"stage\d+", name)]
        if len(known) < 2:
            raise ValueError(
                "method uskd reads the student's last stage but one, and the student names "
                f"{len(known)} stages; name a module path with method.weak_tap"
            )
        return {"student": (known[-2],)}

    def head(self, networks: Networks) -> nn.Module:
        (shape,) = networks.shapes["student"].values()
        return WeakHead(shape, networks.classes)

    def loss(self, out: Outputs, target: Tensor, epoch: float) -> tuple[Tensor, Terms]:
        result = uskd_loss(
            out.student,
            out.head["weak"],
            target,
            alpha=self.alpha,
            beta=self.beta,
            mu=self.mu,
            rank=self.rank,
            ce_weight=self.ce_weight,
            return_terms=True,
        )
        return with_terms(result)
