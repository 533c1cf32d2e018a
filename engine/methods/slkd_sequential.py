"""SLKD*: self-learning teachers that were trained before, and do not learn any more."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ...kernels.kd import kd_loss
from .method import Now, Outputs, Terms, with_terms
from .parts.self_learning import SelfLearning


class SequentialSLKD(SelfLearning):
    """The second phase of sequential SLKD: the student's loss of SLKD, from frozen SL-Ts.

    The SL-Ts are the recipe's assistants: networks like the teacher, each trained from it by KD in
    a run of its own (the first phase). No code was released; that they are frozen and in
    evaluation mode is how the paper reads.
    """

    name: Literal["slkd_sequential"] = "slkd_sequential"
    uses_assistants: ClassVar[bool] = True

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        assert out.teacher is not None
        self.check_assistants(len(out.assistants))
        loss, terms = with_terms(
            kd_loss(
                out.student,
                out.teacher,
                target,
                temperature=self.temperature,
                kd_weight=self.kd_weight,
                ce_weight=self.ce_weight + self.fused_ce_weight,
                return_terms=True,
            )
        )
        fused, found = with_terms(
            kd_loss(
                out.student,
                self.fuse(out.assistants),
                temperature=self.temperature,
                kd_weight=self.fused_kd_weight,
                return_terms=True,
            )
        )
        return loss + fused, {**terms, "fused_kd": found["kd"]}

    def check_assistants(self, count: int) -> None:
        if self.fusion is not None and len(self.fusion) != count:
            raise ValueError(
                f"method.fusion: {len(self.fusion)} weights for {count} assistants; give one for "
                "each"
            )
