"""What the labels say: the class of soft ones, cross-entropy and right answers of the student."""

from torch import Tensor

from ....kernels.kd import kd_loss
from ..method import Outputs, Terms, with_terms


def hard(target: Tensor) -> Tensor:
    """(N,) labels; of class probabilities (N, C) the largest, the lower class of equal ones."""
    return target if target.dim() == 1 else target.argmax(1)


def unsmoothed(target: Tensor) -> Tensor:
    """Class probabilities (N, C) of one or two labels a row, without what smoothing added.

    It gave each class the same share, which is all that the others have: the smallest probability
    of the row. Raises ValueError for C == 2, where there may be no others.
    """
    classes = target.shape[1]
    if classes == 2:
        raise ValueError(
            "two mixed labels of 2 classes leave none to tell smoothing by; set data.mixup, "
            "data.cutmix and data.smoothing to 0"
        )
    share = target.amin(1, keepdim=True)
    return (target - share) / (1 - classes * share)


def from_labels(out: Outputs, target: Tensor, weight: float) -> tuple[Tensor, Terms]:
    """`weight` * CE of the student's logits (N, C), and the terms ce, top1, top5 and rows.

    For methods with a teacher whose own loss is not fused with cross-entropy, or not of these
    logits. It is the fused KD with weight 0: the teacher's logits are read, and change nothing.
    """
    loss, terms = with_terms(
        kd_loss(out.student, out.taught, target, kd_weight=0.0, ce_weight=weight, return_terms=True)
    )
    return loss, {name: terms[name] for name in ("ce", "top1", "top5", "rows")}
