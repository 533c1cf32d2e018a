"""Universal self-knowledge distillation (Yang et al. 2023): labels from the student itself."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Size, Tensor, nn

from ...kernels.uskd import uskd_loss
from .ce import labelled
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
from .parts.labels import unsmoothed
from .parts.target_term import Form, target_loss, target_probability


class WeakHead(nn.Module):
    """Weak logits from a feature map (N, C, H, W) or from tokens (N, L, C): mean and Linear."""

    def __init__(self, shape: Size, classes: int) -> None:
        super().__init__()
        self.places = (2, 3) if len(shape) == 4 else (1,)
        self.classifier = nn.Linear(shape[1] if len(shape) == 4 else shape[-1], classes)

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        (feature,) = out.student_taps.values()
        return {"weak": self.classifier(feature.mean(self.places))}


class USKD(Method):
    """CE, the self-made target and rank labels, and a weak head on the last stage but one.

    `target_term` and `labels` are the published ablation: with a label w of the target class,
    T1 = -w log S_t is USKD's own, T2 is -(1 - w) log(1 - S_t). The label is S_t^2 or S_t, less its
    mean over each process's own rows, plus 1, so that it may pass 1; or what the student's running
    average gives the target, for which no code was released.

    The two labels of a mixed image are targets, as released, before smoothing, which is
    cross-entropy's alone; the ablation is defined for one label.
    """

    name: Literal["uskd"] = "uskd"
    alpha: float = Field(1.0, ge=0, description="weight of the target term")
    beta: float = Field(0.1, ge=0, description="weight of the non-target term")
    mu: float = Field(0.005, ge=0, description="weight of the weak head's loss")
    rank: Literal["released", "paper"] = Field(
        "released", description="how the non-target classes are ranked"
    )
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    target_term: Form = Field("t1", description="of the binary cross-entropy with the label")
    labels: Literal["square", "plain", "average"] = Field(
        "square", description="made from S_t^2, from S_t (tf-NKD), or by the running average"
    )
    weak_tap: str | None = Field(
        None, description="point or module path that the weak head reads; null: last stage but one"
    )

    @property
    def takes_soft_labels(self) -> bool:
        return self._released

    @property
    def uses_average(self) -> bool:
        return self.labels == "average"

    def reads(self, points: Mapping[Role, Points]) -> dict[Role, tuple[str, ...]]:
        if self.weak_tap is not None:
            return {"student": (self.weak_tap,)}
        known = stage_names(points["student"])
        if len(known) < 2:
            raise ValueError(
                "method uskd reads the student's last stage but one, and the student names "
                f"{len(known)} stages; name a module path with method.weak_tap, or "
                + own_taps("stage1", "stage2")
            )
        return {"student": (known[-2],)}

    def head(self, networks: Networks) -> nn.Module:
        (shape,) = networks.shapes["student"].values()
        return WeakHead(shape, networks.classes)

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        soft = target.dim() == 2
        loss, terms = with_terms(
            uskd_loss(
                out.student,
                out.head["weak"],
                unsmoothed(target) if soft else target,
                alpha=self.alpha if self._released else 0.0,
                beta=self.beta,
                mu=self.mu,
                rank=self.rank,
                ce_weight=0.0 if soft else self.ce_weight,
                return_terms=True,
            )
        )
        if soft:
            ce, found = labelled(out.student, target)
            return loss + self.ce_weight * ce, {**terms, "ce": found["ce"]}
        if self._released:
            return loss, terms
        value = target_loss(out.student, target, self._label(out, target), self.target_term)
        return loss + self.alpha * value, {**terms, "target": value.detach()}

    @property
    def _released(self) -> bool:
        return self.target_term == "t1" and self.labels == "square"

    def _label(self, out: Outputs, target: Tensor) -> Tensor:
        """(N,) soft labels of the target class, without gradient."""
        if self.labels == "average":
            assert out.average is not None
            return target_probability(out.average, target)
        own = target_probability(out.student, target)
        score = own.square() if self.labels == "square" else own
        return score + 1 - score.mean()
