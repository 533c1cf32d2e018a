"""What the labels alone say: cross-entropy and right answers of the student, in one pass."""

from torch import Tensor

from ...kernels.kd import kd_loss
from .method import Outputs, Terms, with_terms


def from_labels(out: Outputs, target: Tensor, weight: float) -> tuple[Tensor, Terms]:
    """`weight` * CE of the student's logits (N, C), and the terms ce, top1, top5 and rows.

    For the methods whose other terms read something else than these logits at T; they have a
    teacher, and the fused KD with weight 0 leaves it out.
    """
    assert out.teacher is not None
    loss, terms = with_terms(
        kd_loss(
            out.student, out.teacher, target, kd_weight=0.0, ce_weight=weight, return_terms=True
        )
    )
    return loss, {name: terms[name] for name in ("ce", "top1", "top5", "rows")}
