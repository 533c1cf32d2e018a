"""Normalised knowledge distillation (Yang et al. 2023)."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...kernels.nkd import nkd_loss
from .method import Method, Now, Outputs, Terms, with_terms
from .parts.labels import hard
from .parts.target_term import Form, target_loss, target_probability


class NKD(Method):
    """CE, the target term weighted by the teacher, and the normalised non-target term.

    `target_term` is the published ablation: T1 = -V_t log S_t is NKD's own, T2 is
    -(1 - V_t) log(1 - S_t); V_t and S_t are what teacher and student give the target at T = 1.
    Of soft labels the largest is the target, as released; cross-entropy takes them whole.
    """

    name: Literal["nkd"] = "nkd"
    uses_teacher: ClassVar[bool] = True
    splits_target: ClassVar[bool] = True

    temperature: float = Field(1.0, gt=0, description="T of the non-target part")
    gamma: float = Field(1.5, ge=0, description="weight of the non-target part")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    target_term: Form = Field("t1", description="of the teacher's binary cross-entropy")

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "listed" if self.target_term == "t1" else "whole"

    @property
    def nonlinear(self) -> str:
        if self.temperature == 1:
            return ""
        return f"it takes the target's probability at T = 1, not at {self.temperature:g}"

    @property
    def takes_soft_labels(self) -> bool:
        return True

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        loss, terms = with_terms(
            nkd_loss(
                out.student,
                out.taught,
                target,
                gamma=self.gamma,
                temperature=self.temperature,
                ce_weight=self.ce_weight,
                return_terms=True,
            )
        )
        if self.target_term == "t1":
            return loss, terms
        # nkd_loss always has T1, with weight 1: it is taken out again.
        assert out.teacher is not None
        label = hard(target)
        weight = target_probability(out.teacher, label)
        wanted = target_loss(out.student, label, weight, self.target_term)
        t1 = target_loss(out.student, label, weight, "t1")
        return loss - t1 + wanted, {**terms, "target": wanted.detach()}
