"""Decoupled knowledge distillation (Zhao et al. 2022), with its linear warm-up over epochs."""

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...kernels.dkd import dkd_loss
from .method import Method, Now, Outputs, Terms, with_terms
from .parts.labels import from_labels
from .parts.standardise import standardised


class DKD(Method):
    """ce_weight * CE + min(epoch / warmup, 1) * (alpha * TCKD + beta * NCKD), epoch from 1.

    With `standardise` (Sun et al. 2024) the published T is 2, and their kd_weight (9) is a factor
    of both alpha and beta.
    """

    name: Literal["dkd"] = "dkd"
    uses_teacher: ClassVar[bool] = True
    splits_target: ClassVar[bool] = True

    temperature: float = Field(4.0, gt=0, description="T of both networks' probabilities")
    alpha: float = Field(1.0, ge=0, description="weight of the target-class part")
    beta: float = Field(8.0, ge=0, description="weight of the non-target part")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    warmup: int = Field(
        20, ge=0, description="epochs over which alpha and beta grow to full; 0: none"
    )
    standardise: bool = Field(
        False, description="TCKD and NCKD of both networks' z-scored logits; CE of the logits"
    )

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "whole" if self.standardise else "listed"

    def schedule(self, epoch: float) -> dict[str, float]:
        """The share of the distillation terms: a step a whole epoch, as published."""
        if self.warmup == 0:
            return {}
        return {"warm": min((math.floor(epoch) + 1) / self.warmup, 1.0)}

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        apart = self.standardise or self.warmup > 0
        student, teacher = out.student, out.taught
        if self.standardise:
            assert out.teacher is not None
            student, teacher = standardised(student), standardised(out.teacher)
        loss, terms = with_terms(
            dkd_loss(
                student,
                teacher,
                target,
                alpha=self.alpha,
                beta=self.beta,
                temperature=self.temperature,
                ce_weight=0.0 if apart else self.ce_weight,
                return_terms=True,
            )
        )
        if not apart:
            return loss, terms
        ce, found = from_labels(out, target, self.ce_weight)
        return ce + now.get("warm", 1.0) * loss, {**terms, **found}
