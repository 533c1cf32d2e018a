"""Teacher-free NKD (Yang et al. 2023): the student's own smoothed target probability as weight."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from ...kernels.tf_nkd import tf_nkd_loss
from .method import Method, Outputs, Terms, with_terms


class TfNKD(Method):
    """CE plus the target term; its batch mean is taken over each rank's own rows."""

    name: Literal["tf_nkd"] = "tf_nkd"

    weight: float = Field(1.0, ge=0, description="weight of the target term")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")

    def loss(self, out: Outputs, target: Tensor, epoch: float) -> tuple[Tensor, Terms]:
        result = tf_nkd_loss(
            out.student, target, weight=self.weight, ce_weight=self.ce_weight, return_terms=True
        )
        return with_terms(result)
