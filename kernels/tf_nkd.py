"""Teacher-free normalised knowledge distillation with cross-entropy.

Yang et al., "Rethinking Knowledge Distillation via Cross-Entropy" (the first version of NKD), for
the target classes t of a row, one, or the two of a mixed label with values V_t:
    loss = weight * sum_t -w_t log S_t + ce_weight * CE(z, y)
    w_t = S_t + V_t - (mean over the batch of S_t), no gradient, and 0 where V_t = 0
The mean runs over the rows that count of this call's batch (under DDP: of this rank's).
Memory traffic of forward and backward together: 3 elements a logit (the batch mean needs a pass
over the rows of its own; then the gradient is written).
"""

import torch
from torch import Tensor

from . import reference
from .call import run
from .checks import weight as finite
from .op import Loss, LossModule, Op, Options
from .parts import Logits
from .sharded import whole
from .triton.lang import jit, tl
from .triton.rows import param


def rows(students, teachers, y, params):
    """The loss of each row and its terms in plain PyTorch; see `reference.py`."""
    gain, ce_weight = params
    (z,) = students
    value = reference.smoothed_target(z, y, squared=False)
    ce = reference.cross_entropy(z, y)
    loss = sum(w * x for w, x in ((gain, value), (ce_weight, ce)) if w) + torch.zeros_like(ce)
    top1, top5 = reference.hits(z, y, 1), reference.hits(z, y, 5)
    return loss, {"target": value, "ce": ce, "top1": top1, "top5": top5}


def from_stats(zs, ts, pairs, params, valid, labelled):
    """The same from the statistics of all parts of the rows; see `sharded/whole.py`."""
    gain, ce_weight = params
    (z,), g = zs, whole.no_gradient(zs[0].lse)
    score = torch.where(valid, z.log_label.exp(), 0.0)
    w = score + 1 - score.sum() / valid.sum().clamp(min=1)
    target = whole.gated(w, -z.log_label)
    g.c, g.label = gain * w * z.unit_at_one, gain * w * z.log_label.expm1()
    ce = whole.cross_entropy(z, ce_weight, g)
    return whole.gated(gain, target) + whole.gated(ce_weight, ce), [[target, ce]], [g], None


@jit
def coefficients(params, REAL: tl.constexpr):
    """The weights of the smoothed target and of cross-entropy, whose sum a row is."""
    return param(params, 0, REAL), param(params, 1, REAL)


OP = Op(
    "tf_nkd",
    rows,
    lambda _: ("target", "ce", "top1", "top5"),
    coefficients,
    from_stats,
    own_rows=True,
    labels=2,
    temperature=None,
)


def tf_nkd_loss(
    student: Logits,  # (N, C)
    target: Tensor,  # (N,) int64 or (N, C) probabilities
    *,
    weight: float = 1.0,
    ce_weight: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    return_terms: bool = False,
    backend: str | None = None,
    stored_gradient: bool = True,
) -> Loss:
    """Teacher-free NKD, with cross-entropy.

    Of class probabilities the two largest are the targets (one, where the second is 0), while
    cross-entropy takes them whole. There is no temperature. `kd_loss` describes the other
    arguments, the terms (here target, ce, top1, top5, rows), the value and the errors.
    """
    params = [finite("weight", weight), finite("ce_weight", ce_weight)]
    options = Options(reduction, ignore_index, denominator, return_terms, backend, stored_gradient)
    return run(OP, [student], [], target, params, options)


class TfNKDLoss(LossModule):
    """`tf_nkd_loss` with its settings kept: TfNKDLoss(ce_weight=1)(student, target)."""

    function = staticmethod(tf_nkd_loss)
