"""Normalised knowledge distillation with cross-entropy, in one pass.

Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach
with Normalized Loss and Customized Soft Labels", equation 6; S, V: softmax of student and teacher,
S', V': the same at temperature T over the classes other than y.
    loss = -V_y log S_y - gamma * T^2 * sum_{j != y} V'_j log S'_j + ce_weight * CE(z, y)
The second term is a cross-entropy: the teacher's entropy stays in its value.
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
from .triton.rows import INF, gated, param, spread


def rows(students, teachers, y, params):
    """The loss of each row and its terms in plain PyTorch; see `reference.py`."""
    temperature, square, gamma, ce_weight = params
    (z,), (t,) = students, teachers
    label = torch.nn.functional.one_hot(y.index[:, 0], z.shape[1]).bool()
    v = t.softmax(1).gather(1, y.index)
    target = -reference.cross(v, z.log_softmax(1).gather(1, y.index))
    v_rest = reference.log_softmax(t / temperature, label).exp()
    others = -square * reference.cross(v_rest, reference.log_softmax(z / temperature, label))
    ce = reference.cross_entropy(z, y)
    loss = target + sum(w * x for w, x in ((gamma, others), (ce_weight, ce)) if w)
    top1, top5 = reference.hits(z, y, 1), reference.hits(z, y, 5)
    return loss, {"target": target, "others": others, "ce": ce, "top1": top1, "top5": top5}


def from_stats(zs, ts, pairs, params, valid, labelled):
    """The same from the statistics of all parts of the rows; see `sharded/whole.py`."""
    temperature, square, gamma, ce_weight = params
    (z,), (t,), step = zs, ts, gamma * square / temperature
    weight = t.log_label.exp()
    target = whole.gated(weight, -z.log_label)
    none, empty = t.total == 0, z.total == 0
    b = torch.where(none, 0.0, 1 / t.total)
    others = torch.where(empty, torch.inf, z.log_rest - pairs[0] * b)
    others = square * torch.where(none, 0.0, others)
    a = step * torch.where(none | empty, 0.0, 1 / z.total)
    g = whole.Gradient(a, weight * z.unit_at_one, weight * z.log_label.expm1(), [(-step * b, 0)])
    ce = whole.cross_entropy(z, ce_weight, g)
    loss = target + whole.gated(gamma, others) + whole.gated(ce_weight, ce)
    return loss, [[target, others, ce]], [g], None


@jit
def coefficients(params, z, taught, REAL: tl.constexpr):
    """From the statistics of a row (triton/taught.py) to its value and the gradient's factors."""
    z_total, _, _, at1 = z
    t_total, _, _, t1, weighted = taught[0]
    square, gamma = param(params, 1, REAL), param(params, 2, REAL)
    step = gamma * square / param(params, 0, REAL)
    weight = t1[1]
    target = gated(weight, -at1[3])
    others = square * (tl.log(z_total) - weighted * spread(t_total))
    others = tl.where(z_total == 0, INF, others)
    others = tl.where(t_total == 0, 0.0, others)
    a = tl.where(t_total == 0, 0.0, step * spread(z_total))
    own = target + gated(gamma, others)
    c, at_label, b = weight * at1[4], -weight * at1[2], step * spread(t_total)
    return own, (target, others), a, c, (b,), at_label, param(params, 3, REAL)


OP = Op(
    "nkd",
    rows,
    lambda _: ("target", "others", "ce", "top1", "top5"),
    coefficients,
    from_stats,
    sparse=True,
    rest_weight=2,
    teacher_at_1=True,
    entropy=False,
)


def nkd_loss(
    student: Logits,  # (N, C)
    teacher: Tensor | SparseTeacher,  # (N, C), or k of the C logits a row
    target: Tensor,  # (N,) int64 or (N, C) probabilities
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    t_squared: bool = True,
    return_terms: bool = False,
    backend: str | None = None,
    stored_gradient: bool = True,
) -> Loss:
    """Normalised knowledge distillation (Yang et al. 2023), with cross-entropy.

    gamma weighs the non-target part; temperature is that part's (lambda in the paper), the target
    part is at T = 1. A SparseTeacher's mass belongs to `temperature`; the target part takes the
    logits that it stands for there. Of class probabilities the largest is the label of the
    distillation terms, as in the released code, while cross-entropy takes them whole. `kd_loss`
    describes the other arguments, the terms (here target, others, ce, top1, top5, rows), the value
    and the errors.

    Raises:
        ValueError: also for C == 2 with gamma != 0, where the non-target part has a single class.
    """
    t = positive("temperature", temperature)
    params = [t, scale(t, t_squared), weight("gamma", gamma), weight("ce_weight", ce_weight)]
    if gamma and isinstance(student, Tensor) and student.dim() == 2 and student.shape[1] == 2:
        raise ValueError("C == 2 leaves the non-target part a single class; use gamma=0 or kd_loss")
    options = Options(reduction, ignore_index, denominator, return_terms, backend, stored_gradient)
    return run(OP, [student], [teacher], target, params, options)


class NKDLoss(LossModule):
    """`nkd_loss` with its settings kept: NKDLoss(gamma=1.5)(student, teacher, target)."""

    function = staticmethod(nkd_loss)
