"""Self-learning teacher distillation: the student learns from the teacher and from teachers that
are still learning (SL-Ts), all in one step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from ...kernels.kd import kd_loss
from ...kernels.slkd import slkd_loss
from ...kernels.sparse import SparseTeacher
from .method import Now, Outputs, Terms, with_terms
from .parts.self_learning import SelfLearning


class SLKD(SelfLearning):
    """Parallel SLKD: KD from the teacher, KD from the fused SL-Ts, and KD for each SL-T."""

    name: Literal["slkd"] = "slkd"
    slts: int = Field(2, ge=1, description="how many SL-Ts")
    detach_slts: bool = Field(True, description="false: the student's loss reaches the SL-Ts")
    teachers: Literal["both", "teacher", "slts"] = Field(
        "both", description="whom the student learns from; the SL-Ts learn from the teacher"
    )

    @property
    def takes_recorded(self) -> Literal["none", "whole", "dense", "listed"]:
        return "dense"

    @property
    def slt_count(self) -> int:
        return self.slts

    @model_validator(mode="after")
    def _options_fit(self) -> SLKD:
        if self.fusion is not None and len(self.fusion) != self.slts:
            raise ValueError(
                f"fusion has {len(self.fusion)} weights for slts = {self.slts}; give one for each"
            )
        if self.teachers == "teacher":
            fused = ("fused_ce_weight", "fused_kd_weight", "fusion", "detach_slts")
            if found := self.unused("teachers teacher", "method", *fused):
                raise ValueError("\n".join(found))
        return self

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        assert out.teacher is not None
        if out.fused is not None:
            return self._recorded(out, out.teacher, out.fused, target)
        from_teacher, from_slts = self.teachers != "slts", self.teachers != "teacher"
        # The fused op weighs the student's and the SL-Ts' KD from the teacher alike.
        loss, terms = with_terms(
            slkd_loss(
                out.student,
                out.teacher,
                out.slts,
                target,
                temperature=self.temperature,
                ce_weight=self.ce_weight if from_teacher else 0.0,
                kd_weight=self.kd_weight if from_teacher else 0.0,
                fused_ce_weight=self.fused_ce_weight if from_slts else 0.0,
                fused_kd_weight=self.fused_kd_weight if from_slts else 0.0,
                fusion=self.fusion,
                detach_slts=self.detach_slts,
                return_terms=True,
            )
        )
        if from_teacher:
            return loss, terms
        for slt in out.slts:
            loss = loss + self._kd(slt, out.teacher, target)[0]
        return loss, terms

    def _recorded(
        self, out: Outputs, teacher: Tensor, fused: Tensor | SparseTeacher, target: Tensor
    ) -> tuple[Tensor, Terms]:
        """The same loss term by term, where the SL-Ts' answers are recorded or come from a record.

        A pass for each pair, so that both compute the student's loss by the same calls; the one
        pass fuses in its registers, which rounds otherwise.
        """
        loss, found = with_terms(
            kd_loss(
                out.student,
                fused,
                target,
                temperature=self.temperature,
                kd_weight=self.fused_kd_weight,
                ce_weight=self.fused_ce_weight,
                return_terms=True,
            )
        )
        terms = {**found, "fused_kd": found["kd"]}
        if self.teachers == "both":
            own, found = self._kd(out.student, teacher, target)
            loss, terms["kd"] = own + loss, found["kd"]
        else:
            del terms["kd"]
        for k, slt in enumerate(out.slts):
            own, found = self._kd(slt, teacher, target)
            loss = loss + own
            terms |= {f"slt{k}_{name}": found[name] for name in ("kd", "ce", "top1", "top5")}
        return loss, terms

    def _kd(self, network: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Terms]:
        """What the student and each SL-T learn from the teacher."""
        return with_terms(
            kd_loss(
                network,
                teacher,
                target,
                temperature=self.temperature,
                kd_weight=self.kd_weight,
                ce_weight=self.ce_weight,
                return_terms=True,
            )
        )
