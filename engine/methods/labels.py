"""What the labels alone say: cross-entropy and right answers of the student, in one pass."""

from torch import Tensor

from ...kernels.kd import kd_loss
from .method import Outputs, Terms, with_terms


def from_labels(out: Outputs, target: Tensor, weight: float) -> tuple[Tensor, Terms]:
    """`weight` * CE of the student's logits (N, C), and the terms ce, top1, top5 and rows.

    For methods with a teacher whose own loss is not fused with cross-entropy, or not of these
    logits. It is the fused KD with weight 0: the teacher's logits are read, and change nothing.
    """
    assert out.teacher is not None
    loss, terms = with_terms(
        kd_loss(
            out.student, out.teacher, target, kd_weight=0.0, ce_weight=weight, return_terms=True
        )
    )
    return loss, {name: terms[name] for name in ("ce", "top1", "top5", "rows")}
