"""Normalised knowledge distillation (Yang et al. 2023)."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...kernels.nkd import nkd_loss
from .method import Method, Outputs, Terms, with_terms


class NKD(Method):
    """CE, the target term weighted by the teacher, and the normalised non-target term."""

    name: Literal["nkd"] = "nkd"
    uses_teacher: ClassVar[bool] = True

    temperature: float = Field(1.0, gt=0, description="T of the non-target part")
    gamma: float = Field(1.5, ge=0, description="weight of the non-target part")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")

    def loss(self, out: Outputs, target: Tensor, epoch: float) -> tuple[Tensor, Terms]:
        assert out.teacher is not None
        result = nkd_loss(
            out.student,
            out.teacher,
            target,
            gamma=self.gamma,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            return_terms=True,
        )
        return with_terms(result)
