"""Universal self-knowledge distillation (Yang et al. 2023): labels from the student itself."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from ...kernels.uskd import uskd_loss
from .method import Method, Outputs, Terms, with_terms


class USKD(Method):
    """CE, the self-made target and rank labels, and a weak head on the last stage but one."""

    name: Literal["uskd"] = "uskd"
    slts: ClassVar[int] = 0
    tap: ClassVar[int | None] = -2

    alpha: float = Field(1.0, ge=0, description="weight of the target term")
    beta: float = Field(0.1, ge=0, description="weight of the non-target term")
    mu: float = Field(0.005, ge=0, description="weight of the weak head's loss")
    rank: Literal["released", "paper"] = Field(
        "released", description="how the non-target classes are ranked"
    )
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")

    def heads(self, channels: int | None, classes: int) -> nn.ModuleDict:
        if channels is None:
            raise ValueError("uskd reads the student's last stage but one, and got no channels")
        weak = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )  # (N, channels, H, W) -> (N, classes)
        return nn.ModuleDict({"weak": weak})

    def loss(self, out: Outputs, target: Tensor, epoch: float) -> tuple[Tensor, Terms]:
        result = uskd_loss(
            out.student,
            out.heads["weak"],
            target,
            alpha=self.alpha,
            beta=self.beta,
            mu=self.mu,
            rank=self.rank,
            ce_weight=self.ce_weight,
            return_terms=True,
        )
        return with_terms(result)
