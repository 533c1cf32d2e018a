"""DGKD: the student learns from the teacher and all its assistants, some left out by chance."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...kernels.kd import kd_loss
from .method import Method, Now, Outputs, Terms, with_terms
from .parts.labels import from_labels


class DGKD(Method):
    """(1 - kd_weight) * CE + kd_weight * T^2 * sum over the kept guides of KL(guide || student).

    Son et al., ICCV 2021, "Densely Guided Knowledge Distillation using Multiple Teacher
    Assistants"; the guides are the teacher and the recipe's assistants. Defaults are the released
    code's: its KL is divided by N * C (`reduction` "mean"), and its kd_weight of 1 leaves the
    labels out. Each process draws the guides it leaves out.
    """

    name: Literal["dgkd"] = "dgkd"
    uses_teacher: ClassVar[bool] = True
    uses_assistants: ClassVar[bool] = True

    temperature: float = Field(5.0, gt=0, description="T of all networks' probabilities")
    kd_weight: float = Field(
        1.0, ge=0, le=1, description="lambda: weight of KD; cross-entropy has 1 - lambda"
    )
    reduction: Literal["batchmean", "mean"] = Field(
        "mean", description="KL over the batch; mean: divided by the number of classes too"
    )
    drop: int = Field(1, ge=0, description="guides that each step leaves out by chance")

    def check_assistants(self, count: int) -> None:
        if self.drop > count:
            raise ValueError(
                f"method.drop: {self.drop} leaves none of {count + 1} guides (the teacher and "
                f"{count} assistants); lower it or add assistants"
            )

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        """As every method; the terms kd, assistant0_kd, ... are those of all guides, dropped too,
        as batch means with either reduction."""
        assert out.teacher is not None
        guides = {"": out.teacher, **{f"assistant{i}_": z for i, z in enumerate(out.assistants)}}
        self.check_assistants(len(out.assistants))
        loss, terms = from_labels(out, target, 1 - self.kd_weight)
        share = out.student.shape[1] if self.reduction == "mean" else 1
        values = []
        for name, guide in guides.items():
            value, found = with_terms(
                kd_loss(
                    out.student,
                    guide,
                    temperature=self.temperature,
                    kd_weight=self.kd_weight / share,
                    return_terms=True,
                )
            )
            values.append(value)
            terms[f"{name}kd"] = found["kd"]
        # Drawn where the losses are, and all guides computed: the choice is never waited for.
        order = torch.rand(len(values), device=loss.device).argsort()
        kept = torch.stack(values).where(order >= self.drop, 0.0)
        return loss + kept.sum(), terms
