"""Knowledge distillation (Hinton et al. 2015): match the teacher's softened probabilities."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...kernels.kd import kd_loss
from .method import Method, Now, Outputs, Terms, with_terms
from .parts.labels import from_labels
from .parts.standardise import standardised


class KD(Method):
    """ce_weight * CE + kd_weight * T^2 * KL(teacher || student).

    (1 - tau) * CE + tau * t^2 * KL, as JointRD and others write it, is ce_weight = 1 - tau,
    kd_weight = tau, temperature = t. Code that calls KLDivLoss with its default reduction (TAKD,
    DeiT, Tf-KD) divides KL by N * C, not by N: `reduction` "mean". Logit standardisation (Sun et
    al. 2024; published with T = 2 and kd_weight = 9) is `standardise`.
    """

    name: Literal["kd"] = "kd"
    uses_teacher: ClassVar[bool] = True

    temperature: float = Field(4.0, gt=0, description="T of both networks' probabilities")
    ce_weight: float = Field(0.1, ge=0, description="weight of the cross-entropy")
    kd_weight: float = Field(0.9, ge=0, description="weight of T^2 KL(teacher || student)")
    reduction: Literal["batchmean", "mean"] = Field(
        "batchmean", description="KL over the batch; mean: divided by the number of classes too"
    )
    standardise: bool = Field(
        False, description="KL of both networks' z-scored logits; cross-entropy of the logits"
    )

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "whole" if self.standardise else "listed"

    @property
    def takes_soft_labels(self) -> bool:
        return True

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        """As every method; the term kd is T^2 KL as a batch mean with either reduction."""
        student, teacher = out.student, out.taught
        if self.standardise:
            assert out.teacher is not None
            student, teacher = standardised(student), standardised(out.teacher)
        loss, terms = with_terms(
            kd_loss(
                student,
                teacher,
                target,
                temperature=self.temperature,
                kd_weight=self.kd_weight / (student.shape[1] if self.reduction == "mean" else 1),
                ce_weight=0.0 if self.standardise else self.ce_weight,
                return_terms=True,
            )
        )
        if not self.standardise:
            return loss, terms
        ce, found = from_labels(out, target, self.ce_weight)
        return ce + loss, {**terms, **found}
