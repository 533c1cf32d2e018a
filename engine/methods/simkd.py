"""SimKD: the student's features are projected onto the teacher's, whose classifier is reused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Size, Tensor, nn

from ...kernels.kd import kd_loss
from .method import (
    Method,
    Networks,
    Now,
    Outputs,
    Points,
    Role,
    Terms,
    own_taps,
    stage_names,
    with_terms,
)
from .parts.feature import Names
from .parts.reused import Projector, Reused, aligned


class SimKD(Method):
    """The distance of projected student features to the teacher's (Chen et al., CVPR 2022).

    What is kept is the student up to its last feature map, the projector and the teacher's
    classifier: the student's own classifier is neither trained nor used. The options beyond
    `factor` are those of a study of SimKD; where that leaves something open, the choice is stated
    with the option. Distances are means over each process's own images.
    """

    name: Literal["simkd"] = "simkd"
    uses_teacher: ClassVar[bool] = True
    deploys_head: ClassVar[bool] = True
    reads_student: ClassVar[Literal["logits", "taps"]] = "taps"

    factor: int = Field(2, ge=1, description="the projector is so many times narrower inside")
    projectors: Literal["last", "two", "all"] = Field(
        "last",
        description="last: as published; two: one more after 2/3 of the stages; all: each stage",
    )
    bias: Literal["none", "added", "instead"] = Field(
        "none", description="of the projectors' convolutions; instead: in place of BatchNorm"
    )
    distance: Literal["l2", "kl"] = Field(
        "l2", description="l2: mean squared difference; kl: of softmaxed features, teacher first"
    )
    kl_over: Literal["channels", "positions"] = Field(
        "channels", description="kl: what the softmax runs over"
    )
    kl_temperature: float = Field(1.0, gt=0, description="kl: T of the features")
    only_right: bool = Field(
        False, description="learn only from images that the teacher gets right"
    )
    kept_mean: bool = Field(
        True, description="only_right: mean over the images kept; false: over the whole batch"
    )
    feature_weight: float = Field(1.0, ge=0, description="weight of the last projector's distance")
    extra_weight: float = Field(1.0, ge=0, description="weight of each other projector's distance")
    ce_weight: float = Field(0.0, ge=0, description="cross-entropy of the reused classifier")
    kd_weight: float = Field(0.0, ge=0, description="T^2 KL of the reused classifier's logits")
    temperature: float = Field(4.0, gt=0, description="T of the KD term")
    student_taps: Names | None = Field(
        None, description="points or module paths, the last feeds the classifier; null: stages"
    )
    teacher_taps: Names | None = Field(
        None, description="their partners, the last before the teacher's pooling; null: stages"
    )

    @model_validator(mode="after")
    def _options_have_effect(self) -> SimKD:
        found = []
        if self.distance == "l2":
            found += self.unused("distance l2", "method", "kl_over", "kl_temperature")
        if not self.only_right:
            found += self.unused("only_right false", "method", "kept_mean")
        if self.projectors == "last":
            found += self.unused("projectors last", "method", "extra_weight")
        if self.kd_weight == 0:
            found += self.unused("kd_weight 0", "method", "temperature")
        if (self.student_taps is None) != (self.teacher_taps is None):
            found.append("method.student_taps: give it together with method.teacher_taps")
        if self.student_taps and self.teacher_taps:
            found += self.unused("student_taps", "method", "projectors")
            if len(self.student_taps) != len(self.teacher_taps):
                found.append(
                    f"method.student_taps: {len(self.student_taps)} points for "
                    f"{len(self.teacher_taps)} method.teacher_taps; give pairs"
                )
        if found:
            raise ValueError("\n".join(found))
        return self

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "whole"

    @property
    def takes_taps(self) -> Literal["none", "values", "layers"]:
        return "layers"

    def reads(self, points: Mapping[Role, Points]) -> dict[Role, tuple[str, ...]]:
        pairs = self.pairs(points)
        student, teacher = zip(*pairs, strict=True)
        return {"student": tuple(dict.fromkeys(student)), "teacher": tuple(dict.fromkeys(teacher))}

    def pairs(self, points: Mapping[Role, Points]) -> list[tuple[str, str]]:
        """The student's and the teacher's point of each projector, the reused one last.

        Stages are paired by depth: the i-th of n with the one at the same share of the teacher's.
        """
        if "pooled" not in points["teacher"] or "classifier" not in points["teacher"]:
            raise ValueError(
                "method simkd reuses the teacher's classifier, and this teacher does not say where "
                "it pools and classifies; take one of the CIFAR networks or torchvision:resnet*, "
                "or " + own_taps("pooled", "classifier")
            )
        if self.student_taps and self.teacher_taps:
            return list(zip(self.student_taps, self.teacher_taps, strict=True))
        student, teacher = (stage_names(points[role]) for role in ("student", "teacher"))
        if not student:
            raise ValueError(
                "method simkd reads the student's stages, and it names none; give module paths "
                "with method.student_taps and method.teacher_taps, or " + own_taps("stage1")
            )
        n = len(student)
        chosen = {"last": [], "two": [round(2 * n / 3)], "all": list(range(1, n))}[self.projectors]
        before = [i for i in chosen if i < n]
        partner = [teacher[-(-i * len(teacher) // n) - 1] for i in before]
        last = points["teacher"]["pooled"] + ":in"  # what is pooled and classified
        return [(student[i - 1], t) for i, t in zip(before, partner, strict=True)] + [
            (student[-1], last)
        ]

    def head(self, networks: Networks) -> Projections:
        assert networks.teacher is not None
        pairs = self.pairs(networks.points)
        shapes = [(networks.shapes["student"][s], networks.shapes["teacher"][t]) for s, t in pairs]
        path = networks.points["teacher"]["classifier"]
        classifier = networks.teacher.get_submodule(path)
        if not isinstance(classifier, nn.Linear):
            raise ValueError(f"method simkd: the teacher's {path} is no linear layer to reuse")
        return Projections(pairs, shapes, classifier, self.factor, self.bias)

    def features(self, out: Outputs, target: Tensor) -> Terms:
        assert out.teacher is not None
        right = out.teacher.argmax(1) == target if self.only_right else None  # (N,)
        found = {}
        count = sum(name.startswith("projected") for name in out.head)
        for i in range(count):
            student, teacher = out.head[f"projected{i}"].float(), out.head[f"wanted{i}"].float()
            rows = self._distances(student, teacher)
            if right is None:
                value = rows.mean()
            else:
                kept = right.sum().clamp(min=1) if self.kept_mean else len(rows)
                value = rows.where(right, 0.0).sum() / kept
            found["feature" if i == count - 1 else f"feature{i}"] = value
        return found

    def _distances(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N,) distances of feature maps (N, C, H, W), means over everything but the images."""
        if self.distance == "l2":
            return (student - teacher).square().flatten(1).mean(1)
        student, teacher = student.flatten(2), teacher.flatten(2)
        over = 1 if self.kl_over == "channels" else 2
        log_q = F.log_softmax(student / self.kl_temperature, over)
        log_p = F.log_softmax(teacher / self.kl_temperature, over)
        return (log_p.exp() * (log_p - log_q)).sum(over).mean(1)

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        assert out.teacher is not None
        used = self.ce_weight > 0 or self.kd_weight > 0
        logits = out.head["logits"]
        total, terms = with_terms(
            kd_loss(
                logits if used else logits.detach(),
                out.teacher,
                target,
                temperature=self.temperature,
                ce_weight=self.ce_weight,
                kd_weight=self.kd_weight,
                return_terms=True,
            )
        )
        for name, value in out.features.items():
            weight = self.feature_weight if name == "feature" else self.extra_weight
            total = total + weight * value
        return total, {**terms, **{name: value.detach() for name, value in out.features.items()}}

    def deployed(
        self, student: nn.Module, head: nn.Module | None, until: Callable[[str], nn.Module]
    ) -> nn.Module:
        assert isinstance(head, Projections)
        return Reused(until(head.pairs[-1][0]), head.projectors[-1], head.classifier)


class Projections(nn.Module):
    """Projectors of the student's features, and a frozen copy of the teacher's classifier."""

    def __init__(
        self,
        pairs: list[tuple[str, str]],
        shapes: list[tuple[Size, Size]],
        classifier: nn.Linear,
        factor: int,
        bias: Literal["none", "added", "instead"],
    ) -> None:
        super().__init__()
        self.pairs = pairs
        self.projectors = nn.ModuleList(
            Projector(student[1], teacher[1], factor, bias, student[2:], teacher[2:])
            for student, teacher in shapes
        )
        device, dtype = classifier.weight.device, classifier.weight.dtype
        self.classifier = nn.Linear(
            classifier.in_features, classifier.out_features, device=device, dtype=dtype
        )
        self.classifier.load_state_dict(classifier.state_dict())
        self.classifier.requires_grad_(False)

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        made = {}
        for i, ((student, teacher), projector) in enumerate(
            zip(self.pairs, self.projectors, strict=True)
        ):
            projected = projector(out.student_taps[student])
            made[f"projected{i}"] = projected
            made[f"wanted{i}"] = aligned(out.teacher_taps[teacher], projected.shape[2:])
        made["logits"] = self.classifier(projected.mean((2, 3)))
        return made
