"""The methods that compare feature maps: cross-entropy, if wanted KD, and one feature loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ....kernels.kd import kd_loss
from ...recipe.schema import LISTED
from ..method import Method, Now, Outputs, Points, Role, Terms, own_taps, stage_names, with_terms

Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1), LISTED]


class FeatureMethod(Method):
    """ce_weight * CE + kd_weight * T^2 KL + feature_weight * (the sum of what `features` gives)."""

    uses_teacher: ClassVar[bool] = True
    default_taps: ClassVar[str]  # "stages", "stages.pre", "last", "last.pre" or a point's name

    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    kd_weight: float = Field(0.0, ge=0, description="weight of T^2 KL(teacher || student)")
    temperature: float = Field(4.0, gt=0, description="T of the KD term")
    student_taps: Names | None = Field(
        None, description="points or module paths of the student; null: as published"
    )
    teacher_taps: Names | None = Field(
        None, description="points or module paths of the teacher; null: as published"
    )
    feature_weight: float = Field(1.0, ge=0, description="weight of the feature loss")

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "whole" if self.teacher_mode == "eval" else "none"

    @property
    def takes_taps(self) -> Literal["none", "values", "layers"]:
        return "values"

    @model_validator(mode="after")
    def _taps_and_temperature_work(self) -> FeatureMethod:
        found = []
        if self.kd_weight == 0:
            found += self.unused("kd_weight 0", "method", "temperature")
        for name in ("student_taps", "teacher_taps"):
            taps = getattr(self, name) or ()
            if len(set(taps)) < len(taps):
                found.append(f"method.{name}: a point stands twice in {list(taps)}")
        if found:
            raise ValueError("\n".join(found))
        return self

    def reads(self, points: Mapping[Role, Points]) -> dict[Role, tuple[str, ...]]:
        student = self.student_taps or self._published("student", points["student"])
        teacher = self.teacher_taps or self._published("teacher", points["teacher"])
        if len(student) != len(teacher):
            raise ValueError(
                f"method {self.name} pairs the networks' features, and the student has "
                f"{len(student)} ({', '.join(student)}), the teacher {len(teacher)} "
                f"({', '.join(teacher)}); name pairs with method.student_taps and "
                "method.teacher_taps"
            )
        return {"student": student, "teacher": teacher}

    def pairs(self, out: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Student's and teacher's float32 features at each pair of taps, the teacher's detached."""
        teacher = [value.detach().float() for value in out.teacher_taps.values()]
        student = [value.float() for value in out.student_taps.values()]
        return list(zip(student, teacher, strict=True))

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        assert out.teacher is not None
        logits, terms = with_terms(
            kd_loss(
                out.student,
                out.teacher,
                target,
                temperature=self.temperature,
                kd_weight=self.kd_weight,
                ce_weight=self.ce_weight,
                return_terms=True,
            )
        )
        weight = now.get("share", 1.0) * self.feature_weight
        total = logits
        for value in out.features.values():
            total = total + weight * value
        return total, {**terms, **{name: v.detach() for name, v in out.features.items()}}

    def _published(self, role: str, points: Points) -> tuple[str, ...]:
        """The points that are tapped unless the options name others."""
        return self._named(self.default_taps, role, points)

    def _named(self, taps: str, role: str, points: Points) -> tuple[str, ...]:
        """`taps`, written as `default_taps` is, as names that the network has."""
        base, dot, suffix = taps.partition(".")
        stages = stage_names(points, dot + suffix)
        found = {"stages": stages, "last": stages[-1:]}.get(
            base, tuple(name for name in points if name == taps)
        )
        if not found:
            named = {"stages": f"stage1{dot}{suffix}", "last": "stage1"}.get(base, taps)
            raise ValueError(
                f"method {self.name} reads {taps} of the {role}, which names no such "
                f"points; name module paths with method.{role}_taps, or {own_taps(named)}"
            )
        return found
