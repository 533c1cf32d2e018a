"""Knowledge distillation (Hinton et al. 2015): match the teacher's softened probabilities."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...kernels.kd import kd_loss
from .method import Method, Outputs, Terms, with_terms


class KD(Method):
    """ce_weight * CE + kd_weight * T^2 * KL(teacher || student)."""

    name: Literal["kd"] = "kd"
    uses_teacher: ClassVar[bool] = True

    temperature: float = Field(4.0, gt=0, description="T of both networks' probabilities")
    ce_weight: float = Field(0.1, ge=0, description="weight of the cross-entropy")
    kd_weight: float = Field(0.9, ge=0, description="weight of T^2 KL(teacher || student)")

    def loss(self, out: Outputs, target: Tensor, epoch: float) -> tuple[Tensor, Terms]:
        assert out.teacher is not None
        result = kd_loss(
            out.student,
            out.teacher,
            target,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            return_terms=True,
        )
        return with_terms(result)
