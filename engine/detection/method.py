"""The methods of detection: what each adds to Faster R-CNN's own loss, on the logits of its RoIs.

R: RoIs that the student samples in all images of a process's batch, background ones too;
C: categories of the data; logits are (R, C + 1), labels (R,), both with the background as class 0.

mdistiller's detector, the one whose code is public, does it so: the student samples RoIs as it
does for its own loss, the teacher's box head scores the same RoIs on the teacher's own features,
and the distillation loss is the mean over the RoIs, added with weight 1 to the four losses of
Faster R-CNN. NKD's paper gives its numbers on COCO (supplement) and no code for them; the options
of KD and NKD here are those that it uses on ImageNet.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ...kernels.dkd import dkd_loss
from ...kernels.kd import kd_loss
from ...kernels.nkd import nkd_loss
from ..recipe.schema import Strict

Terms = dict[str, Tensor]


class Baseline(Strict):
    """Faster R-CNN's own loss alone: a student without a teacher, or the teacher to be."""

    name: Literal["baseline"] = "baseline"
    uses_teacher: ClassVar[bool] = False


class Distillation(Strict):
    """Base of the methods with a teacher: Faster R-CNN's own loss + weight * `loss`."""

    name: str
    uses_teacher: ClassVar[bool] = True
    own_terms: ClassVar[tuple[str, ...]]  # of the fused loss, beside its ce, top1, top5 and rows

    weight: float = Field(1.0, gt=0, description="of the distillation loss beside the detector's")

    @abstractmethod
    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        """The mean over the RoIs, 0-dim float32 and not weighted, and its detached 0-dim terms."""

    def named(self, result: Tensor | tuple[Tensor, Terms]) -> tuple[Tensor, Terms]:
        """What a fused loss gives with return_terms=True, its own terms alone."""
        assert isinstance(result, tuple)
        loss, terms = result
        return loss, {name: terms[name] for name in self.own_terms}


class KD(Distillation):
    """T^2 * KL(teacher || student) over C + 1 classes (Hinton et al. 2015)."""

    name: Literal["kd"] = "kd"
    own_terms: ClassVar[tuple[str, ...]] = ("kd",)

    temperature: float = Field(1.0, gt=0, description="T of both networks' probabilities")

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        return self.named(
            kd_loss(student, teacher, labels, temperature=self.temperature, return_terms=True)
        )


class DKD(Distillation):
    """alpha * TCKD + beta * NCKD (Zhao et al. 2022); the defaults are mdistiller's for detection.

    The target of a background RoI is the background, and its other classes are the categories.
    There is no warm-up of alpha and beta.
    """

    name: Literal["dkd"] = "dkd"
    own_terms: ClassVar[tuple[str, ...]] = ("tckd", "nckd")

    temperature: float = Field(1.0, gt=0, description="T of both networks' probabilities")
    alpha: float = Field(1.0, ge=0, description="weight of the target-class part")
    beta: float = Field(0.25, ge=0, description="weight of the non-target part")

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        return self.named(
            dkd_loss(
                student,
                teacher,
                labels,
                alpha=self.alpha,
                beta=self.beta,
                temperature=self.temperature,
                return_terms=True,
            )
        )


class NKD(Distillation):
    """The target term weighted by the teacher + gamma * the normalised non-target term.

    Yang et al. 2023; the classifier's cross-entropy stands in the detector's own loss.
    """

    name: Literal["nkd"] = "nkd"
    own_terms: ClassVar[tuple[str, ...]] = ("target", "others")

    temperature: float = Field(1.0, gt=0, description="T of the non-target part")
    gamma: float = Field(1.5, ge=0, description="weight of the non-target part")

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        return self.named(
            nkd_loss(
                student,
                teacher,
                labels,
                gamma=self.gamma,
                temperature=self.temperature,
                return_terms=True,
            )
        )


METHODS: dict[str, type[Baseline] | type[Distillation]] = {
    "baseline": Baseline,
    "kd": KD,
    "dkd": DKD,
    "nkd": NKD,
}
