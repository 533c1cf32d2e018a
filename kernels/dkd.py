"""Decoupled knowledge distillation, target and non-target part, with cross-entropy, in one pass.

Zhao et al. 2022, "Decoupled Knowledge Distillation", equations 6 and 7: with b = softmax(./T)[y],
    TCKD = KL over the pair (b, 1 - b)          NCKD = KL over the classes other than y
    loss = T^2 * (alpha * TCKD + beta * NCKD) + ce_weight * CE(z, y)
Memory traffic of forward and backward together: 3 elements a logit, or 2 and k a row for
a teacher of k logits a row.
"""

import torch
from torch import Tensor

from . import reference
from .call import run
from .checks import positive, scale, weight
from .op import Loss, LossModule, Op, Options
from .parts import Logits
from .sharded import whole
from .sparse import SparseTeacher
from .triton.lang import jit, tl
from .triton.rows import gated, kl_rest, number, param, spread


def rows(students, teachers, y, params):
    """The loss of each row and its terms in plain PyTorch; see `reference.py`."""
    temperature, square, alpha, beta, ce_weight = params
    (z,), (t,) = students, teachers
    label = torch.nn.functional.one_hot(y.index[:, 0], z.shape[1]).bool()

    def pair(x):  # (N, 2): log b and log(1 - b)
        log_p = x.log_softmax(1)
        rest = reference.log_softmax_rest(x, label)
        return torch.stack([log_p.gather(1, y.index)[:, 0], rest], 1)

    zt, tt = z / temperature, t / temperature
    tckd = square * reference.kl(pair(tt), pair(zt))
    nckd = square * reference.kl(reference.log_softmax(tt, label), reference.log_softmax(zt, label))
    ce = reference.cross_entropy(z, y)
    loss = sum(w * v for w, v in ((alpha, tckd), (beta, nckd), (ce_weight, ce)) if w)
    loss = loss + torch.zeros_like(ce)
    top1, top5 = reference.hits(z, y, 1), reference.hits(z, y, 5)
    return loss, {"tckd": tckd, "nckd": nckd, "ce": ce, "top1": top1, "top5": top5}


def from_stats(zs, ts, pairs, params, valid, labelled):
    """The same from the statistics of all parts of the rows; see `sharded/whole.py`."""
    temperature, square, alpha, beta, ce_weight = params
    (z,), (t,), step = zs, ts, square / temperature
    q_rest = (t.log_rest - t.lse).exp()
    ratio = whole.gated(q_rest, (t.log_rest - t.lse) - (z.log_rest - z.lse))
    tckd = square * (whole.gated(t.p_label, (t.label - t.lse) - (z.label - z.lse)) + ratio)
    none, empty = t.total == 0, z.total == 0
    b, own = torch.where(none, 0.0, 1 / t.total), torch.where(empty, 0.0, 1 / z.total)
    nckd = pairs[0] * b + (z.log_rest - t.log_rest)
    nckd = square * torch.where(none, 0.0, torch.where(empty, torch.inf, nckd))
    gap = z.p_label - t.p_label
    gap = whole.gated(alpha, gap)
    a = step * (whole.gated(beta, torch.where(none, 0.0, own)) - gap * own)
    g = whole.Gradient(a, torch.zeros_like(a), step * gap, [(-step * whole.gated(beta, b), 0)])
    ce = whole.cross_entropy(z, ce_weight, g)
    loss = whole.gated(alpha, tckd) + whole.gated(beta, nckd) + whole.gated(ce_weight, ce)
    return loss, [[tckd, nckd, ce]], [g], None


@jit
def coefficients(params, z, taught, REAL: tl.constexpr):
    """From the statistics of a row (triton/taught.py) to its value and the gradient's factors."""
    z_total, _, at, _ = z
    t_total, _, t, _, crossed = taught[0]
    square, alpha = param(params, 1, REAL), param(params, 2, REAL)
    beta, ce_weight = param(params, 3, REAL), param(params, 4, REAL)
    step = square / param(params, 0, REAL)
    # Before TCKD: after it a number more is alive, and on sm_90 a top-k teacher's row spills.
    value, a, b = kl_rest(z_total, t_total, crossed)
    nckd = square * value
    # log((1 - q_y) / (1 - p_y)) as a difference of log-sum-exps.
    others_ratio = (tl.log(t_total) - t[0]) - (tl.log(z_total) - at[0])
    tckd = square * (gated(t[1], t[3] - at[3]) + gated(t[2], others_ratio))
    # d TCKD / d z_j = -gap * p_j / (1 - p_y), and p_j / (1 - p_y) = e_j / sum.
    gap = gated(alpha, at[1] - t[1])
    a = step * (gated(beta, a) - gap * spread(z_total))
    own = gated(alpha, tckd) + gated(beta, nckd)
    bs = (step * gated(beta, b),)
    return own, (tckd, nckd), a, number(0, REAL), bs, step * gap, ce_weight


OP = Op(
    "dkd",
    rows,
    lambda _: ("tckd", "nckd", "ce", "top1", "top5"),
    coefficients,
    from_stats,
    labels=0,
    sparse=True,
    rest_weight=3,
)


def dkd_loss(
    student: Logits,  # (N, C)
    teacher: Tensor | SparseTeacher,  # (N, C), or k of the C logits a row
    target: Tensor,  # (N,) int64
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ce_weight: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    t_squared: bool = True,
    return_terms: bool = False,
    backend: str | None = None,
    stored_gradient: bool = True,
) -> Loss:
    """Decoupled knowledge distillation (Zhao et al. 2022), with cross-entropy.

    alpha weighs the target part (TCKD), beta the non-target part (NCKD). Where the teacher has no
    mass outside the label, NCKD is 0. A SparseTeacher's mass belongs to `temperature`. Class
    probabilities as a target are refused: the method needs one label. `kd_loss` describes the other
    arguments, the terms (here tckd, nckd, ce, top1, top5, rows), the returned value and the errors.

    Raises:
        ValueError: also for C == 2 with beta != 0, where NCKD has a single class.
    """
    t = positive("temperature", temperature)
    params = [
        t,
        scale(t, t_squared),
        weight("alpha", alpha),
        weight("beta", beta),
        weight("ce_weight", ce_weight),
    ]
    if beta and isinstance(student, Tensor) and student.dim() == 2 and student.shape[1] == 2:
        raise ValueError("C == 2 leaves NCKD a single class; use beta=0 or kd_loss")
    options = Options(reduction, ignore_index, denominator, return_terms, backend, stored_gradient)
    return run(OP, [student], [teacher], target, params, options)


class DKDLoss(LossModule):
    """`dkd_loss` with its settings kept: DKDLoss(beta=2)(student, teacher, target)."""

    function = staticmethod(dkd_loss)
