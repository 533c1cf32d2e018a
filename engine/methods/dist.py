"""DIST: match the relations between a batch's predictions, not the predictions themselves."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm

from .method import Method, Now, Outputs, Terms
from .parts.gather import gathered
from .parts.labels import from_labels


class DIST(Method):
    """ce_weight * CE + kd_weight * T^2 * (beta * (1 - inter) + gamma * (1 - intra)).

    Huang et al., NeurIPS 2022, "Knowledge Distillation from a Stronger Teacher": with both
    networks' probabilities at T as (N, C) matrices, inter is the mean Pearson correlation of their
    rows, intra that of their columns. Defaults: the released ImageNet settings; CIFAR-100 has
    T = 4. A column is a batch: each process's own images, as released, unless `gather`.
    """

    name: Literal["dist"] = "dist"
    uses_teacher: ClassVar[bool] = True

    temperature: float = Field(1.0, gt=0, description="T of both networks' probabilities")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    kd_weight: float = Field(2.0, ge=0, description="weight of both correlations together")
    beta: float = Field(1.0, ge=0, description="weight of the rows' correlation (inter-class)")
    gamma: float = Field(1.0, ge=0, description="weight of the columns' correlation (intra-class)")
    gather: bool = Field(False, description="columns run over the images of all processes")

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "whole"

    @property
    def gathers(self) -> bool:
        return self.gather

    @property
    def takes_soft_labels(self) -> bool:
        return True

    def features(self, out: Outputs, target: Tensor) -> Terms:
        assert out.teacher is not None
        student = F.softmax(out.student.float() / self.temperature, 1)  # (N, C)
        teacher = F.softmax(out.teacher.float() / self.temperature, 1)
        inter = correlation(student, teacher, 1)  # (N,)
        if self.gather:
            student, teacher = gathered(student), gathered(teacher)
        intra = correlation(student, teacher, 0)  # (C,)
        square = self.temperature**2
        return {"inter": square * (1 - inter.mean()), "intra": square * (1 - intra.mean())}

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        loss, terms = from_labels(out, target, self.ce_weight)
        weights = {"inter": self.kd_weight * self.beta, "intra": self.kd_weight * self.gamma}
        for name, value in out.features.items():
            loss = loss + weights[name] * value
            terms[name] = value.detach()
        return loss, terms


def correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation of two float32 matrices along `dim`; 0 where one is constant.

    The released 1e-8 is added to the product of the norms. It counts: a column of a small batch
    may hold nothing but tiny probabilities.
    """
    a = a - a.mean(dim, keepdim=True)
    b = b - b.mean(dim, keepdim=True)
    norms = vector_norm(a, dim=dim) * vector_norm(b, dim=dim)
    return (a * b).sum(dim) / (norms + 1e-8)
