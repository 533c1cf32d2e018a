"""Hinton's knowledge distillation with one or K teachers and cross-entropy, in one pass.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2:
    loss = kd_weight * T^2 * sum_k w_k KL(softmax(t_k / T) || softmax(z / T)) + ce_weight * CE(z, y)
Memory traffic of forward and backward together: K + 2 elements a logit (read the student and K
teachers, write the gradient); a teacher of k logits a row adds k, not C, of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .call import run
from .checks import as_list, check_weights, positive, scale, weight
from .op import Loss, LossModule, Op, Options
from .parts import Logits
from .sharded import whole
from .sparse import SparseTeacher
from .triton.lang import jit, tl
from .triton.rows import gated, joined, kl, none, number, param


def rows(students, teachers, y, params):
    """The loss of each row and its terms in plain PyTorch; see `reference.py`."""
    temperature, square, kd_weight, ce_weight, *weights = params
    (z,) = students
    log_p = (z / temperature).log_softmax(1)
    kd = sum(
        w * square * reference.kl((t / temperature).log_softmax(1), log_p)
        for w, t in zip(weights, teachers, strict=True)
        if w != 0
    ) + torch.zeros_like(z[:, 0])
    return reference.with_cross_entropy(kd, kd_weight, z, y, ce_weight)


def from_stats(zs, ts, pairs, params, valid, labelled):
    """The same from the statistics of all parts of the rows; see `sharded/whole.py`."""
    temperature, square, kd_weight, ce_weight, *weights = params
    (z,), g = zs, whole.no_gradient(zs[0].lse)
    value = torch.zeros_like(z.lse)
    for k, w in enumerate(weights):
        if w == 0:
            continue
        pair, step = whole.kl(z, ts[k], pairs[k]), kd_weight * w * square / temperature
        value = value + w * square * pair.value
        g.a = g.a + whole.gated(step, pair.a)
        g.label = g.label + whole.gated(step, pair.label)
        g.others.append((-whole.gated(step, pair.b), k))
    ce = whole.cross_entropy(z, ce_weight, g) if labelled else torch.zeros_like(value)
    return whole.gated(kd_weight, value) + whole.gated(ce_weight, ce), [[value, ce]], [g], None


@jit
def coefficients(params, z, taught, REAL: tl.constexpr):
    """From the statistics of a row (triton/taught.py) to its value and the gradient's factors."""
    _, z_label, at, _ = z
    temperature, square = param(params, 0, REAL), param(params, 1, REAL)
    kd_weight, ce_weight = param(params, 2, REAL), param(params, 3, REAL)
    value, a, at_label, bs = number(0, REAL), number(0, REAL), number(0, REAL), none()
    for k in tl.static_range(len(taught)):
        _, t_label, t, _, crossed = taught[k]
        pair, gap, _ = kl(z_label, at, t_label, t, crossed)
        weight = param(params, 4 + k, REAL)
        step = kd_weight * weight * square / temperature
        value += gated(weight * square, pair)
        a += gated(step, at[4])
        at_label += gated(step, gap)
        bs = joined(bs, (gated(step, t[4]),))
    return gated(kd_weight, value), (value,), a, number(0, REAL), bs, at_label, ce_weight


OP = Op(
    "kd",
    rows,
    lambda _: ("kd", "ce", "top1", "top5"),
    coefficients,
    from_stats,
    needs_target=False,
    sparse=True,
    teacher_weights=4,
)


def kd_loss(
    student: Logits,  # (N, C)
    # (N, C), or k of the C logits a row, or K teachers of either kind
    teacher: Tensor | SparseTeacher | Sequence[Tensor | SparseTeacher],
    target: Tensor | None = None,  # (N,) int64 or (N, C) probabilities
    *,
    temperature: float = 4.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    teacher_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    t_squared: bool = True,
    return_terms: bool = False,
    backend: str | None = None,
    stored_gradient: bool = True,
) -> Loss:
    """Knowledge distillation (Hinton et al. 2015) from one or several teachers, with cross-entropy.

    Args:
        student: (N, C) floating-point logits; a ClassPart or a DTensor where they are spread
            over processes (`kernels/parts.py`, `kernels/sharded/dtensor.py`).
        teacher: (N, C) logits without grad, or a SparseTeacher of k logits a row, or a sequence of
            K of either; their types may differ.
        target: (N,) int64 class indices, or (N, C) class probabilities (mixup, CutMix). Needed
            where ce_weight is not 0; given without it, the terms still report ce, top1 and top5.
        temperature: T > 0 of the distillation term; cross-entropy is at T = 1.
        kd_weight, ce_weight: weights of the two terms.
        teacher_weights: K weights >= 0 of the teachers' KL terms; default 1/K each.
        reduction: "mean" over the rows that count, "sum", or "none" for (N,) losses.
        ignore_index: rows with this target have loss and gradient 0 and leave the mean.
        denominator: divides the sum of the rows instead of their count, with reduction="mean".
        t_squared: multiply the distillation term by T^2, which keeps its gradient's size over T.
        return_terms: also return a dict of detached 0-dim tensors: the terms before weighting, as
            means over the rows that count, and the counts top1, top5 (right rows) and rows.
        backend: None takes the fused one of the student's device; or "reference", "cpu", ...
        stored_gradient: True stores the gradient in the forward pass; False keeps the logits and
            makes it in the backward pass, exact for low-precision types under loss scaling.

    Returns:
        0-dim loss (float64 for float64 logits, else float32), or (N,) for reduction="none"; with
        return_terms a pair of it and the terms.

    Raises:
        ValueError: shapes, devices, values or a target outside the classes.
        TypeError: logits or target of the wrong type.
        RuntimeError: a backend that this machine cannot run.
    """
    teachers = [teacher] if isinstance(teacher, SparseTeacher) else as_list(teacher, "teacher")
    t = positive("temperature", temperature)
    params = [
        t,
        scale(t, t_squared),
        weight("kd_weight", kd_weight),
        weight("ce_weight", ce_weight),
        *check_weights("teacher_weights", teacher_weights, len(teachers)),
    ]
    if ce_weight and target is None:
        raise ValueError(f"ce_weight={ce_weight} needs a target; pass one, or ce_weight=0")
    options = Options(reduction, ignore_index, denominator, return_terms, backend, stored_gradient)
    return run(OP, [student], teachers, target, params, options)


class KDLoss(LossModule):
    """`kd_loss` with its settings kept: KDLoss(temperature=4)(student, teacher, target)."""

    function = staticmethod(kd_loss)
