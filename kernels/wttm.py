"""Weighted transformed teacher matching (WTTM, and TTM) with cross-entropy, in one pass.

Zheng and Yang 2024, "Knowledge Distillation Based on Transformed Teacher Matching" (ICLR),
algorithm 1: with p the teacher's softmax, gamma = 1 / T and q = p^gamma / sum_j p_j^gamma,
    loss = kd_weight * U * KL(q || softmax(z)) + ce_weight * CE(z, y)
where U = sum_j p_j^gamma is the row's weight (TTM: 1). The student stays at T = 1; q is the
teacher's softmax at T.
Memory traffic of forward and backward together: 3 elements a logit, or 2 and k a row for a teacher
of k logits a row.
"""

import torch
from torch import Tensor

from . import reference
from .call import run
from .checks import positive, weight
from .op import Loss, LossModule, Op, Options
from .parts import Logits
from .sharded import whole
from .sparse import SparseTeacher
from .triton.lang import jit, tl
from .triton.rows import gated, kl, number, param


def rows(students, teachers, y, params):
    """The loss of each row and its terms in plain PyTorch; see `reference.py`."""
    temperature, kd_weight, ce_weight, weighted = params
    (z,), (t,) = students, teachers
    log_p = t.log_softmax(1) / temperature
    log_u = log_p.logsumexp(1, keepdim=True)
    kd = reference.kl(log_p - log_u, z.log_softmax(1))
    kd = log_u[:, 0].exp() * kd if weighted else kd
    return reference.with_cross_entropy(kd, kd_weight, z, y, ce_weight)


def from_stats(zs, ts, pairs, params, valid, labelled):
    """The same from the statistics of all parts of the rows; see `sharded/whole.py`."""
    temperature, kd_weight, ce_weight, weighted = params
    (z,), (t,) = zs, ts
    pair, u = whole.kl(z, t, pairs[0]), torch.ones_like(z.lse)
    if weighted:
        u = (t.lse - t.lse_at_one / temperature).exp()
    kd, asked = u * pair.value, whole.weighted(whole.gated(kd_weight, u), pair)
    g = whole.no_gradient(z.lse)
    g.a, g.label, g.others = asked.a, asked.label, [(-asked.b, 0)]
    ce = whole.cross_entropy(z, ce_weight, g) if labelled else torch.zeros_like(kd)
    return whole.gated(kd_weight, kd) + whole.gated(ce_weight, ce), [[kd, ce]], [g], None


@jit
def coefficients(params, z, taught, REAL: tl.constexpr):
    """From the statistics of a row (triton/taught.py) to its value and the gradient's factors."""
    _, z_label, at, _ = z
    _, t_label, t, t1, crossed = taught[0]
    temperature, kd_weight = param(params, 0, REAL), param(params, 1, REAL)
    ce_weight, weighted = param(params, 2, REAL), param(params, 3, REAL)
    value, gap, _ = kl(z_label, at, t_label, t, crossed)
    u = tl.where(weighted != 0, tl.exp(t[0] - t1[0] / temperature), 1.0)
    kd, step = u * value, gated(kd_weight, u)
    a, bs, at_label = gated(step, at[4]), (gated(step, t[4]),), gated(step, gap)
    return gated(kd_weight, kd), (kd,), a, number(0, REAL), bs, at_label, ce_weight


OP = Op(
    "wttm",
    rows,
    lambda _: ("kd", "ce", "top1", "top5"),
    coefficients,
    from_stats,
    needs_target=False,
    sparse=True,
    student_at_1=True,
    teacher_at_1=True,
)


def wttm_loss(
    student: Logits,  # (N, C)
    teacher: Tensor | SparseTeacher,  # (N, C), or k of the C logits a row
    target: Tensor | None = None,  # (N,) int64 or (N, C) probabilities
    *,
    temperature: float = 10.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    weighted: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    return_terms: bool = False,
    backend: str | None = None,
    stored_gradient: bool = True,
) -> Loss:
    """Weighted transformed teacher matching (Zheng and Yang 2024), with cross-entropy.

    temperature is the teacher's alone (1 / gamma in the paper); kd_weight is its beta. weighted:
    each row counts by its power sum U, which is largest for a teacher that is unsure; False is TTM.
    A SparseTeacher's mass belongs to `temperature`; U takes the logits that it stands for there.
    `kd_loss` describes the other arguments, the terms, the value and the errors; the term kd holds
    the row's weight.
    """
    params = [
        positive("temperature", temperature),
        weight("kd_weight", kd_weight),
        weight("ce_weight", ce_weight),
        float(weighted),
    ]
    if ce_weight and target is None:
        raise ValueError(f"ce_weight={ce_weight} needs a target; pass one, or ce_weight=0")
    options = Options(reduction, ignore_index, denominator, return_terms, backend, stored_gradient)
    return run(OP, [student], [teacher], target, params, options)


class WTTMLoss(LossModule):
    """`wttm_loss` with its settings kept: WTTMLoss(temperature=5)(student, teacher, target)."""

    function = staticmethod(wttm_loss)
