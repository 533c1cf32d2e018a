"""Weighted transformed teacher matching (Zheng and Yang 2024)."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...kernels.wttm import wttm_loss
from .method import Method, Now, Outputs, Terms, with_terms


class WTTM(Method):
    """ce_weight * CE + kd_weight * U * KL(teacher at T || student at T = 1).

    U, the power sum of the teacher's probabilities, weighs each row: more where the teacher is
    unsure. weighted=false is TTM. The paper's gamma is 1 / temperature, its beta kd_weight.
    """

    name: Literal["wttm"] = "wttm"
    uses_teacher: ClassVar[bool] = True

    temperature: float = Field(10.0, gt=0, description="T of the teacher's probabilities")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    kd_weight: float = Field(3.0, ge=0, description="weight of the KL term")
    weighted: bool = Field(True, description="rows count by the teacher's power sum")

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "listed"

    @property
    def nonlinear(self) -> str:
        return "its rows are weighted by a power of the probabilities" if self.weighted else ""

    @property
    def takes_soft_labels(self) -> bool:
        return True

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        return with_terms(
            wttm_loss(
                out.student,
                out.taught,
                target,
                temperature=self.temperature,
                kd_weight=self.kd_weight,
                ce_weight=self.ce_weight,
                weighted=self.weighted,
                return_terms=True,
            )
        )
