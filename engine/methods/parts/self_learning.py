"""What the two ways of distilling with self-learning teachers (SL-Ts) have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from ..method import Method


class SelfLearning(Method):
    """The student learns from the teacher T and from the fused logits of SL-Ts, networks like T
    that learn from T; see kernels/slkd.py for the formulas and their readings."""

    uses_teacher: ClassVar[bool] = True

    temperature: float = Field(4.0, gt=0, description="T of all networks' probabilities")
    ce_weight: float = Field(
        0.1, ge=0, description="cross-entropy beside the teacher, student and SL-Ts"
    )
    kd_weight: float = Field(0.9, ge=0, description="KD from the teacher, student and SL-Ts")
    fused_ce_weight: float = Field(1.0, ge=0, description="cross-entropy beside the SL-Ts, student")
    fused_kd_weight: float = Field(1.0, ge=0, description="KD from the fused SL-Ts, student")
    fusion: Annotated[tuple[float, ...], Field(strict=False)] | None = Field(
        None, description="one weight an SL-T, with sum 1; none: equal"
    )

    @property
    def takes_soft_labels(self) -> bool:
        return True

    def fuse(self, slts: list[Tensor]) -> Tensor:
        """(N, C) float32: the mean of the SL-Ts' logits, weighted by `fusion`."""
        weights = self.fusion or [1 / len(slts)] * len(slts)
        first, *rest = (w * slt.float() for w, slt in zip(weights, slts, strict=True))
        return sum(rest, start=first)

    @model_validator(mode="after")
    def _fusion_is_a_mean(self) -> SelfLearning:
        if self.fusion is not None and min(self.fusion, default=0.0) < 0:
            raise ValueError(f"fusion must not be negative, got {self.fusion}")
        if self.fusion is not None and abs(sum(self.fusion) - 1) > 1e-6:
            raise ValueError(f"fusion must sum to 1, got {self.fusion} with sum {sum(self.fusion)}")
        return self
