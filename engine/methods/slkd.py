"""Self-learning teacher distillation: the student learns from the teacher and from teachers that
are still learning (SL-Ts), all in one step."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ...kernels.slkd import slkd_loss
from .method import Method, Outputs, Terms, with_terms


class SLKD(Method):
    """Parallel SLKD: KD from the teacher, KD from the fused SL-Ts, and KD for each SL-T."""

    name: Literal["slkd"] = "slkd"
    uses_teacher: ClassVar[bool] = True
    slts: int = Field(2, ge=1, description="how many SL-Ts")
    temperature: float = Field(4.0, gt=0, description="T of all networks' probabilities")
    ce_weight: float = Field(
        0.1, ge=0, description="cross-entropy beside the teacher, student and SL-Ts"
    )
    kd_weight: float = Field(0.9, ge=0, description="KD from the teacher, student and SL-Ts")
    fused_ce_weight: float = Field(1.0, ge=0, description="cross-entropy beside the SL-Ts, student")
    fused_kd_weight: float = Field(1.0, ge=0, description="KD from the fused SL-Ts, student")
    fusion: Annotated[tuple[float, ...], Field(strict=False)] | None = Field(
        None, description="one weight an SL-T, with sum 1; none: equal"
    )
    detach_slts: bool = Field(True, description="false: the student's loss reaches the SL-Ts")

    @property
    def slt_count(self) -> int:
        return self.slts

    @model_validator(mode="after")
    def _one_fusion_weight_each(self) -> "SLKD":
        if self.fusion is not None and len(self.fusion) != self.slts:
            raise ValueError(
                f"fusion has {len(self.fusion)} weights for slts = {self.slts}; give one for each"
            )
        if self.fusion is not None and abs(sum(self.fusion) - 1) > 1e-6:
            raise ValueError(f"fusion must sum to 1, got {self.fusion} with sum {sum(self.fusion)}")
        return self

    def loss(self, out: Outputs, target: Tensor, epoch: float) -> tuple[Tensor, Terms]:
        assert out.teacher is not None
        result = slkd_loss(
            out.student,
            out.teacher,
            out.slts,
            target,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            fused_ce_weight=self.fused_ce_weight,
            fused_kd_weight=self.fused_kd_weight,
            fusion=self.fusion,
            detach_slts=self.detach_slts,
            return_terms=True,
        )
        return with_terms(result)
