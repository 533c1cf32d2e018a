"""CTKD: the temperature is learned against the student, ever harder in the first epochs."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...kernels import dkd, kd, reference
from .method import Method, Networks, Now, Outputs, Terms


class Temperature(nn.Module):
    """One temperature for all images: start + span * sigmoid(theta), theta trained from 1."""

    def __init__(self, start: float, span: float) -> None:
        super().__init__()
        self.start, self.span = start, span
        self.theta = nn.Parameter(torch.ones(()))

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        return {"temperature": self.start + self.span * self.theta.sigmoid()}


class CTKD(Method):
    """KD or DKD at a temperature that is trained to make the loss larger.

    Li et al., AAAI 2023, "Curriculum Temperature for Knowledge Distillation", its global form. The
    gradient of T = start + span * sigmoid(theta) is multiplied by `reversal`, which goes from 0 to
    -1 along a cosine. Theta is trained by the student's optimiser, decay included, as released.
    T is a number on the device that wants a gradient, through the teacher's probabilities as well:
    the losses are the plain-PyTorch forms of kd_loss and dkd_loss.
    """

    name: Literal["ctkd"] = "ctkd"
    uses_teacher: ClassVar[bool] = True

    over: Literal["kd", "dkd"] = Field("kd", description="the loss whose temperature is learned")
    start: float = Field(1.0, gt=0, description="lowest temperature")
    span: float = Field(20.0, ge=0, description="highest temperature less the lowest")
    warmup: int = Field(
        10, ge=0, description="epochs over which T's gradient is turned round; 0: at once"
    )
    ce_weight: float | None = Field(
        None, ge=0, description="weight of the cross-entropy; null: 0.1 over kd, 1 over dkd"
    )
    kd_weight: float = Field(0.9, ge=0, description="kd: weight of T^2 KL(teacher || student)")
    alpha: float = Field(1.0, ge=0, description="dkd: weight of the target-class part")
    beta: float = Field(2.0, ge=0, description="dkd: weight of the non-target part")

    @model_validator(mode="after")
    def _options_have_effect(self) -> CTKD:
        unread = ("alpha", "beta") if self.over == "kd" else ("kd_weight",)
        if found := self.unused(f"over {self.over}", "method", *unread):
            raise ValueError("\n".join(found))
        return self

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "whole"

    def schedule(self, epoch: float) -> dict[str, float]:
        """The factor of the temperature's gradient: a step a whole epoch, as released."""
        done = min((math.floor(epoch) + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return {"reversal": (math.cos(math.pi * done) - 1) / 2}

    def head(self, networks: Networks) -> Temperature:
        if self.over == "dkd" and self.beta and networks.classes == 2:
            raise ValueError(
                "method.over: dkd with 2 classes leaves its non-target part a single one; "
                "use method.beta=0 or method.over=kd"
            )
        return Temperature(self.start, self.span)

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        assert out.teacher is not None
        fixed = out.head["temperature"].detach()
        t = fixed + now["reversal"] * (out.head["temperature"] - fixed)
        student, teacher = [out.student.float()], [out.teacher.float()]
        labels = reference.labels(target, ignore_index=-100, dtype=torch.float32)
        if self.over == "kd":
            ce_weight = 0.1 if self.ce_weight is None else self.ce_weight
            params = [t, t * t, self.kd_weight, ce_weight, 1.0]
            rows, found = kd.rows(student, teacher, labels, params)
        else:
            ce_weight = 1.0 if self.ce_weight is None else self.ce_weight
            params = [t, t * t, self.alpha, self.beta, ce_weight]
            rows, found = dkd.rows(student, teacher, labels, params)
        terms = {
            name: (value.sum() if name in ("top1", "top5") else value.mean()).detach()
            for name, value in found.items()
        }
        terms["rows"] = torch.ones_like(rows).sum()
        return rows.mean(), {**terms, "temperature": fixed}
