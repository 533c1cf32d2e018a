"""Weighted soft labels: the teacher counts less where the student already does as well."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels.kd import kd_loss
from .method import Method, Now, Outputs, Terms, with_terms
from .parts.labels import from_labels


class WSLD(Method):
    """ce_weight * CE + kd_weight * T^2 * the mean of w * KL(teacher || student).

    Zhou et al., ICLR 2021, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
    Tradeoff Perspective": w = 1 - exp(-CE(student) / CE(teacher)) of each image, at T = 1 and
    without gradient. The released code has the soft cross-entropy in place of KL: its gradient is
    the same, its value larger by w times the teacher's entropy. Defaults: CIFAR-100; ImageNet has
    T = 2 and kd_weight = 2.5.
    """

    name: Literal["wsld"] = "wsld"
    uses_teacher: ClassVar[bool] = True

    temperature: float = Field(4.0, gt=0, description="T of both networks' probabilities")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    kd_weight: float = Field(2.25, ge=0, description="weight of the weighted T^2 KL")

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "whole"

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        assert out.teacher is not None
        loss, terms = from_labels(out, target, self.ce_weight)
        kl, _ = with_terms(  # (N,)
            kd_loss(
                out.student,
                out.teacher,
                temperature=self.temperature,
                reduction="none",
                return_terms=True,
            )
        )
        with torch.no_grad():
            own, taught = (
                F.cross_entropy(logits.float(), target, reduction="none")
                for logits in (out.student, out.teacher)
            )
            weight = 1 - torch.exp(-own / (taught + 1e-7))  # (N,)
        kd = (weight * kl).mean()
        return loss + self.kd_weight * kd, {
            **terms,
            "kd": kd.detach(),
            "weight": weight.mean(),
        }
