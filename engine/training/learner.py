"""A student with all that learns beside it: one method's part of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Method, Networks, Outputs, Role, Terms
from ..models import Taps, Until, points, shapes, unreached


class Branch(nn.Module):
    """Student, SL-Ts and head of one method. The frozen teachers stand outside, shared by all."""

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
        self._average: tuple[nn.Module, ...] = ()
        self._features: Callable[[Outputs, Tensor], Terms] = method.features

    @property
    def deployed(self) -> nn.Module:
        """What is evaluated and exported."""
        return self.method.deployed(self.student, self.head, partial(Until, self.student))

    def load(self, held: dict[str, Any]) -> None:
        """Take the weights of student, SL-Ts and head from what a checkpoint holds."""
        self.student.load_state_dict(held["student"])
        for slt, weights in zip(self.slts, held["slts"], strict=True):
            slt.load_state_dict(weights)
        if self.head is not None:
            self.head.load_state_dict(held["head"])

    def follow(self, average: nn.Module) -> None:
        """Let a method that reads it have the student's average."""
        if self.method.uses_average:
            self._average = (average,)

    def prepare(self, compile: bool) -> None:
        """Tap the networks and compile everything if asked: once, after the student was copied."""
        self._taps = [Taps(self.student, self.reads.get("student", ()))]
        self._taps += [Taps(slt, self.reads.get("slts", ())) for slt in self.slts]
        if compile:
            for network in (self.student, *self.slts, *([self.head] if self.head else [])):
                network.compile(dynamic=False)
            self._features = torch.compile(self.method.features, dynamic=False)

    def forward(
        self,
        made: Mapping[str, Tensor],  # (N, 3, H, W) normalised images of "student" and "slts"
        taught: Outputs,  # what the frozen teachers gave; its student is not read
        target: Tensor,
        index: Tensor,
    ) -> Outputs:
        out = replace(
            taught,
            student=self.student(made["student"]),
            slts=[slt(made["slts"]) for slt in self.slts],
        )
        out.student_taps = self._taps[0].take()
        out.teacher_taps = {n: taught.teacher_taps[n] for n in self.reads.get("teacher", ())}
        out.slt_taps = [taps.take() for taps in self._taps[1:]]
        for average in self._average:
            with torch.no_grad():
                out.average = average(made["student"])
        if self.head is not None:
            out.head = self.head(out, target, index)
        return out

    def loss(self, out: Outputs, target: Tensor, epoch: float) -> tuple[Tensor, Terms]:
        """The method's loss and terms for what `forward` gave."""
        return self.method.loss(replace(out, features=self._features(out, target)), target, epoch)
