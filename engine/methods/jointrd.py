"""JointRD: a plain student's early stages also learn through the later stages of a ResNet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from ...kernels.kd import kd_loss
from .ce import labelled
from .method import Method, Networks, Now, Outputs, Points, Role, Terms, with_terms
from .ofd import margins, norms_before, partial_l2

STAGES = 4  # of the networks; the teacher's later ones follow the student's first three
LAST = f"stage{STAGES}.pre"


class _Residual(Method):
    """What the forms of JointRD share (Li et al., NeurIPS 2020).

    z_4 are the student's logits; z_i those of the guide's stages after i, fed with the student's
    pre-ReLU output of stage i. The guide, a ResNet, uses its running statistics there, and its
    weights get no gradient from there. D_i is OFD's margin distance of a connector's output (of
    g_i, the guide's last pre-ReLU feature on that path; for i = 4 of the student's own) to the
    guide's last pre-ReLU feature on the images themselves. Batch statistics are per process.
    """

    guide: ClassVar[Role] = "teacher"
    paths_from: ClassVar[tuple[int, ...]] = (1, 2, 3)

    feature_weight: float = Field(
        0.0, ge=0, description="lambda; released: 0 on CIFAR, 1e-4 on ImageNet"
    )

    def reads(self, points: Mapping[Role, Points]) -> dict[Role, tuple[str, ...]]:
        student = tuple(f"stage{i}.pre" for i in self.paths_from)
        needed: dict[Role, tuple[str, ...]] = {"student": student}
        if self.feature_weight:
            needed = {"student": (*student, LAST), self.guide: (LAST,)}
        for role, names in needed.items():
            absent = [name for name in names if name not in points[role]]
            if absent:
                raise ValueError(
                    f"method {self.name} joins networks of four stages with pre-ReLU outputs, and "
                    f"the {role} has no {', '.join(absent)}; take plain50 as the student and "
                    "jointrd_resnet50 as its teacher, or their kin"
                )
        return needed

    def head(self, networks: Networks) -> nn.Module | None:
        guide = networks.slts[0] if self.guide == "slts" else networks.teacher
        assert guide is not None
        if self.paths_from and not hasattr(guide, "forward_from"):
            raise ValueError(
                f"method {self.name}: paths lead through the teacher's later stages, and a "
                f"{type(guide).__name__} cannot go on from a stage; take jointrd_resnet50 or its "
                "kin"
            )
        if not self.feature_weight:
            return Paths(guide, self.paths_from) if self.paths_from else None
        student = networks.shapes["student"][LAST][1]
        width = networks.shapes[self.guide][LAST][1]
        (norm,) = norms_before(guide, [networks.points[self.guide][LAST]], networks.size)
        assert norm is not None  # networks with forward_from have one there
        connectors = {str(i): connector(width, width) for i in self.paths_from}
        connectors[str(STAGES)] = connector(student, width)
        return Paths(guide, self.paths_from, connectors, norm)

    def features(self, out: Outputs, target: Tensor) -> Terms:
        if not self.feature_weight:
            return {}
        taps = out.slt_taps[0] if self.guide == "slts" else out.teacher_taps
        wanted, margin = taps[LAST].detach().float(), out.head["margin"]
        return {
            name: partial_l2(value.float(), wanted, margin)
            for name, value in out.head.items()
            if name.startswith("feature")
        }


class JointRDReleased(_Residual):
    """CE(z_4) + lambda D_4: what the released command trains, paths being left out of its loss."""

    name: Literal["jointrd_ta_released"] = "jointrd_ta_released"
    uses_teacher: ClassVar[bool] = True
    paths_from: ClassVar[tuple[int, ...]] = ()

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        total, terms = labelled(out.student, target)
        for name, value in out.features.items():
            total = total + self.feature_weight * value
            terms[name] = value.detach()
        return total, terms


class JointRD(_Residual):
    """1/4 [CE(z_4) + m sum CE(z_i) + lambda (D_4 + m sum D_i)] with a frozen, trained teacher."""

    name: Literal["jointrd"] = "jointrd"
    uses_teacher: ClassVar[bool] = True

    decay_to: float = Field(
        0.5, ge=0, le=1, description="m, the weight of the paths, after its cosine from 1"
    )
    decay_epochs: int = Field(60, ge=0, description="epochs of that cosine; 0: decay_to always")
    paths: Literal["ce", "kd"] = Field(
        "ce", description="what z_1 to z_3 learn from; kd: labels and the teacher's logits"
    )
    kd_weight: float = Field(0.9, ge=0, le=1, description="paths kd: tau of (1 - tau) CE + tau KD")
    temperature: float = Field(4.0, gt=0, description="paths kd: T of the KD part")

    @model_validator(mode="after")
    def _options_have_effect(self) -> JointRD:
        if self.paths == "ce":
            found = self.unused("paths ce", "method", "kd_weight", "temperature")
            if found:
                raise ValueError("\n".join(found))
        return self

    def schedule(self, epoch: float) -> dict[str, float]:
        """m, the same for all steps of an epoch, as released."""
        whole = math.floor(epoch)
        if whole >= self.decay_epochs:
            return {"m": self.decay_to}
        share = (1 + math.cos(math.pi * whole / self.decay_epochs)) / 2
        return {"m": self.decay_to + (1 - self.decay_to) * share}

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        m = now["m"]
        total, terms = labelled(out.student, target)
        for i in self.paths_from:
            value = self._path_loss(out, out.head[f"logits{i}"], target)
            total = total + m * value
            terms[f"path{i}"] = value.detach()
        for name, value in out.features.items():
            share = 1.0 if name == f"feature{STAGES}" else m
            total = total + self.feature_weight * share * value
            terms[name] = value.detach()
        return total / STAGES, terms

    def _path_loss(self, out: Outputs, logits: Tensor, target: Tensor) -> Tensor:
        if self.paths == "ce":
            return labelled(logits, target)[0]
        result = kd_loss(
            logits,
            self._guide_logits(out),
            target,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=1 - self.kd_weight,
            return_terms=True,
        )
        return with_terms(result)[0]

    def _guide_logits(self, out: Outputs) -> Tensor:
        assert out.teacher is not None
        return out.teacher


class JointRDJoint(JointRD):
    """JointRD whose teacher is trained beside the student, by CE(z_T), from the recipe's `slt`.

    The paths run through the teacher as it is before the step. (The released code updates the
    teacher first; here one backward pass trains both.)
    """

    name: Literal["jointrd_joint"] = "jointrd_joint"  # type: ignore[assignment]
    uses_teacher: ClassVar[bool] = False
    guide: ClassVar[Role] = "slts"

    @property
    def slt_count(self) -> int:
        return 1

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        total, terms = super().loss(out, target, now)
        own, found = labelled(out.slts[0], target)
        del found["rows"]
        return total + own, terms | {f"slt0_{name}": value for name, value in found.items()}

    def _guide_logits(self, out: Outputs) -> Tensor:
        return out.slts[0].detach()


class Paths(nn.Module):
    """The student's stages followed by the later ones of a network that is not trained by it."""

    def __init__(
        self,
        guide: nn.Module,
        stages: tuple[int, ...],
        connectors: Mapping[str, nn.Module] | None = None,
        norm: nn.BatchNorm2d | None = None,
    ) -> None:
        super().__init__()
        self.stages = stages
        self.connectors = nn.ModuleDict(dict(connectors or {}))
        # In a tuple, they are no part of this module.
        self._guide = (guide,)
        self._norm = (norm,)

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        made = {}
        for i in self.stages:
            feature, logits = behind(self._guide[0], out.student_taps[f"stage{i}.pre"], i)
            made[f"logits{i}"] = logits
            if self.connectors:
                made[f"feature{i}"] = self.connectors[str(i)](feature)
        (norm,) = self._norm
        if norm is not None:
            made[f"feature{STAGES}"] = self.connectors[str(STAGES)](out.student_taps[LAST])
            made["margin"] = margins(norm).view(1, -1, 1, 1)
        return made


class _From(nn.Module):
    """The way from a stage on, as a module whose parameters can be replaced for one call."""

    def __init__(self, guide: nn.Module) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, feature: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        forward_from: Any = self.guide.forward_from
        return forward_from(feature, stage)


def behind(guide: nn.Module, feature: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    """The guide's stages after `stage`, in evaluation mode and without gradients of its weights."""
    way = _From(guide)
    if not guide.training and not next(guide.parameters()).requires_grad:  # the frozen teacher
        return way(feature, stage)
    training = guide.training
    guide.eval()
    try:
        weights = {name: value.detach() for name, value in way.named_parameters()}
        return functional_call(way, weights, (feature, stage))
    finally:
        guide.train(training)


def connector(channels_in: int, channels: int) -> nn.Module:
    """1 x 1 convolution, N(0, sqrt(2 / channels)), and BatchNorm."""
    conv = nn.Conv2d(channels_in, channels, 1, bias=False)
    nn.init.normal_(conv.weight, 0.0, math.sqrt(2 / channels))
    return nn.Sequential(conv, nn.BatchNorm2d(channels))
