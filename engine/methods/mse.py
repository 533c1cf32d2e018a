"""Mean squared error of the features of all stages: the plainest feature distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .method import Networks, Outputs, Points, Role, Terms
from .parts.connector import Connectors
from .parts.feature import FeatureMethod

Weights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)]


class MSE(FeatureMethod):
    """CE + feature_weight * sum over stages of |student's feature - teacher's|^2.

    The baseline "CE + alpha MSE_ALL" of Li et al. (Residual Distillation, NeurIPS 2020), which
    states alpha = 1e-3 and no more. That alpha is the scale of a loss that is summed over each
    image's values and averaged over the images (Heo et al. 2019), so this is the default, on the
    features before the ReLU and without connectors. It is known to be unstable.
    """

    name: Literal["mse"] = "mse"
    default_taps: ClassVar[str] = "stages.pre"

    feature_weight: float = Field(1e-3, ge=0, description="weight of the feature loss")
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="over the values of an image's feature; always mean over images"
    )
    relu: Literal["before", "after"] = Field(
        "before", description="stages are compared before or after their last ReLU"
    )
    connector: bool = Field(
        False, description="a trained 1 x 1 convolution and BatchNorm on each student feature"
    )
    stage_weights: Weights | None = Field(
        None, description="a weight for each pair of taps, shallow to deep; null: 1 each"
    )

    @model_validator(mode="after")
    def _options_have_effect(self) -> MSE:
        if self.student_taps and self.teacher_taps:
            found = self.unused("student_taps and teacher_taps", "method", "relu")
            if found:
                raise ValueError("\n".join(found))
        return self

    def reads(self, points: Mapping[Role, Points]) -> dict[Role, tuple[str, ...]]:
        found = super().reads(points)
        if self.stage_weights is not None and len(self.stage_weights) != len(found["student"]):
            raise ValueError(
                f"method.stage_weights: {len(self.stage_weights)} weights for "
                f"{len(found['student'])} pairs of taps ({', '.join(found['student'])})"
            )
        return found

    def head(self, networks: Networks) -> Connectors | None:
        for student, teacher in zip(
            networks.shapes["student"].items(), networks.shapes["teacher"].items(), strict=True
        ):
            skip = 2 if self.connector else 1  # a connector changes the channels
            if student[1][skip:] != teacher[1][skip:]:
                raise ValueError(
                    f"method mse compares features of one shape, and the student's {student[0]} "
                    f"gives {tuple(student[1])}, the teacher's {teacher[0]} {tuple(teacher[1])}; "
                    "name other points with method.student_taps and method.teacher_taps, or, where "
                    "only the channels differ, set method.connector=true"
                )
        return Connectors(self.name, networks.shapes) if self.connector else None

    def features(self, out: Outputs, target: Tensor) -> Terms:
        pairs = self.pairs(out)
        weights = self.stage_weights or (1.0,) * len(pairs)
        values = []
        for i, (weight, (student, teacher)) in enumerate(zip(weights, pairs, strict=True)):
            if self.connector:
                student = out.head[f"connected{i}"].float()
            squares = (student - teacher).square()
            value = squares.sum() / len(squares) if self.reduction == "sum" else squares.mean()
            values.append(weight * value)
        return {"mse": torch.stack(values).sum()}

    def _published(self, role: str, points: Points) -> tuple[str, ...]:
        taps = self.default_taps if self.relu == "before" else "stages"
        return self._named(taps, role, points)
