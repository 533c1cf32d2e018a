"""A learner: a student with all that is trained beside it, by one method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.sparse import SparseTeacher
from ..cache.forms import Form
from ..methods import Method, Networks, Now, Outputs, Role, Terms
from ..models import Taps, Until, points, shapes, unreached
from .compiled import compile_call
from .ema import EMA


class Learner(nn.Module):
    """Student, SL-Ts and head of one method. The frozen teachers stand outside, shared by all.

    The student's average, where there is one, is not in the module tree: it has no gradients.
    """

    def __init__(
        self,
        method: Method,
        student: nn.Module,
        slts: list[nn.Module],
        teacher: nn.Module | None,
        classes: int,
        size: int,
        labels: Tensor | None,
    ) -> None:
        """`size` is the images' side in pixels; `labels` are the training set's, None to evaluate.

        Without labels there is a head only where it is part of what the method deploys. Raises
        ValueError for networks that do not have what the method reads.
        """
        super().__init__()
        self.method = method
        self.student = student
        self.slts = nn.ModuleList(slts)
        networks: dict[Role, nn.Module] = {"student": student}
        if teacher is not None:
            networks["teacher"] = teacher
        if slts:
            networks["slts"] = slts[0]
        named = {role: points(network) for role, network in networks.items()}
        self.reads: dict[Role, tuple[str, ...]] = {}
        self.head: nn.Module | None = None
        if labels is not None or method.deploys_head:
            self.reads = method.reads(named)
            found = {r: shapes(networks[r], names, size) for r, names in self.reads.items()}
            self.head = method.head(
                Networks(classes, student, teacher, slts, named, found, labels, size)
            )
        if method.reads_student == "taps" and labels is not None:
            # Without a gradient they would hold up the processes of a group, which wait for it.
            for parameter in unreached(student, self.reads["student"], size):
                parameter.requires_grad_(False)
        self._taps: list[Taps] = []  # of the student and of each SL-T
        self._average: tuple[EMA, ...] = ()
        self._features: Callable[[Outputs, Tensor], Terms] = method.features
        self.recorded: Form | None = None  # of the teacher's answers, where they are
        # Where a run records its SL-Ts: what makes one of their logits and takes it, and within
        # which they draw their random numbers.
        self.fused: Callable[[list[Tensor]], Tensor] | None = None
        self.apart: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def deployed(self) -> nn.Module:
        """What is evaluated and exported."""
        return self.method.deployed(self.student, self.head, partial(Until, self.student))

    @property
    def average(self) -> EMA | None:
        """The average of what is deployed."""
        return self._average[0] if self._average else None

    def trained(self) -> dict[str, list[nn.Module]]:
        """The modules of each optimiser: the student with its head, and every SL-T."""
        heads = [] if self.head is None else [self.head]
        slts: dict[str, list[nn.Module]] = {f"slt{i}": [slt] for i, slt in enumerate(self.slts)}
        return {"student": [self.student, *heads], **slts}

    def follow(self, decay: float) -> None:
        """Average the student from now on; before `prepare`, once its device is the last one."""
        self._average = (EMA(self.deployed, decay),)

    def prepare(self) -> None:
        """Tap the networks: once, after the student was copied and before anything is compiled."""
        self._taps = [Taps(self.student, self.reads.get("student", ()))]
        self._taps += [Taps(slt, self.reads.get("slts", ())) for slt in self.slts]

    def networks(self) -> dict[str, dict[str, nn.Module]]:
        """All that has a forward pass in each step, by name, for "student" and "slts"."""
        head = {} if self.head is None else {"head": self.head}
        slts = {f"slt{i}": slt for i, slt in enumerate(self.slts)}
        return {"student": {"student": self.student, **head}, "slts": slts}

    def compile_features(self, name: str) -> None:
        """Compile the losses of the feature maps as one, where the method has any."""
        if type(self.method).features is not Method.features:
            self._features = compile_call(name, self.method.features)

    def forward(
        self,
        made: Mapping[str, Tensor],  # (N, 3, H, W) normalised images of "student" and "slts"
        taught: Outputs,  # what the frozen teachers gave; its student is not read
        target: Tensor,
        index: Tensor,
    ) -> Outputs:
        out = replace(taught, student=self.student(made["student"]))
        if self.slts:
            with self.apart():
                out.slts = [slt(made["slts"]) for slt in self.slts]
            out.fused = None if self.fused is None else self.fused(out.slts)
        if out.listed is not None:
            self._complete(out, out.listed)
        out.student_taps = self._taps[0].take()
        out.teacher_taps = {n: taught.teacher_taps[n] for n in self.reads.get("teacher", ())}
        out.slt_taps = [taps.take() for taps in self._taps[1:]]
        if self.average is not None and self.method.uses_average:
            with torch.no_grad():
                out.average = self.average.module(made["student"])
        if self.head is not None:
            out.head = self.head(out, target, index)
        return out

    def _complete(self, out: Outputs, listed: SparseTeacher) -> None:
        """Make whole logits of recorded ones, where the method or the form wants that."""
        form = self.recorded
        assert form is not None
        if form.rest == "bucket":
            assert form.temperature is not None
            out.teacher, out.listed = listed.bucket(out.student, form.temperature), None
        elif self.method.takes_recorded == "dense":
            temperature = form.temperature or 1.0  # without one there is no mass to spread
            out.teacher, out.listed = listed.dense(form.classes, temperature), None

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        """The method's loss and terms for what `forward` gave."""
        return self.method.loss(replace(out, features=self._features(out, target)), target, now)

    def weights(self, whole: bool) -> dict[str, Any]:
        """What a checkpoint holds; the head only where it is `whole` or the method deploys it."""
        head = self.head if whole or self.method.deploys_head else None
        return {
            "student": self.student.state_dict(),
            "slts": [slt.state_dict() for slt in self.slts],
            "head": None if head is None else head.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
        }

    def load(self, held: Mapping[str, Any]) -> None:
        """Take the weights of everything from what a checkpoint holds."""
        self.student.load_state_dict(held["student"])
        for slt, weights in zip(self.slts, held["slts"], strict=True):
            slt.load_state_dict(weights)
        if self.head is not None:
            self.head.load_state_dict(held["head"])
        if self.average is not None:
            self.average.load_state_dict(held["ema"])
