"""Teacher-free NKD (Yang et al. 2023): the student's own smoothed target probability as weight."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from ...kernels.tf_nkd import tf_nkd_loss
from .ce import labelled
from .method import Method, Now, Outputs, Terms, with_terms
from .parts.labels import unsmoothed


class TfNKD(Method):
    """CE plus the target term; its batch mean is taken over each rank's own rows.

    The two labels of a mixed image are targets, as released, before smoothing, which is
    cross-entropy's alone.
    """

    name: Literal["tf_nkd"] = "tf_nkd"

    weight: float = Field(1.0, ge=0, description="weight of the target term")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")

    @property
    def takes_soft_labels(self) -> bool:
        return True

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        soft = target.dim() == 2
        loss, terms = with_terms(
            tf_nkd_loss(
                out.student,
                unsmoothed(target) if soft else target,
                weight=self.weight,
                ce_weight=0.0 if soft else self.ce_weight,
                return_terms=True,
            )
        )
        if not soft:
            return loss, terms
        ce, found = labelled(out.student, target)
        return loss + self.ce_weight * ce, {**terms, "ce": found["ce"]}
