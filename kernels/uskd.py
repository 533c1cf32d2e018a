"""Universal self-knowledge distillation: customised soft labels without a teacher.

Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation", section 3.2. S is
the student's softmax, S' the same without the targets, W the softmax of the weak head:
    loss = alpha * sum_t -w_t log S_t - beta * sum_{j not a target} Z_j log S'_j
         - mu * sum_j (0.9 y_j + 0.1 / C) log W_j + ce_weight * CE(z, y)
    w_t = S_t^2 + V_t - (mean over the batch of S_t^2), no gradient, and 0 where V_t = 0
Z gives the class of rank r the weight 1 / r (Zipf), drops the targets and sums to 1; the rank is by
    W_j / (1 - W_t + 1e-6) + s_j / (1 - s_t + 1e-6),  s = log S (released code) or S (paper).
Memory traffic of forward and backward together: 6 elements a logit (two sets of logits, the
student's twice for the batch mean, two gradients), beside a sort of each row.
"""

import torch
from torch import Tensor

from . import reference
from .call import run
from .checks import weight
from .op import Loss, LossModule, Op, Options
from .triton.lang import jit, tl
from .triton.rows import param

RANKS = {"released": 0.0, "paper": 1.0}


def zipf(keys: Tensor, drop: Tensor) -> Tensor:
    """(N, C) weights 1 / rank by falling keys, 0 where `drop`, rows summing to 1."""
    rank = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    weights = (1.0 / rank.to(keys.dtype)).masked_fill(drop, 0.0)
    return weights / weights.sum(1, keepdim=True)


def rows(students, teachers, y, params):
    """The loss of each row and its terms in plain PyTorch; see `reference.py`."""
    alpha, beta, mu, paper, ce_weight = params
    z, w = students
    targets = reference.marked(y.index, y.value, z.shape[1])
    with torch.no_grad():
        weak = w.softmax(1)
        own = z.softmax(1) if paper else z.log_softmax(1)
        keys = sum(
            x / (1 - torch.where(targets, x, 0.0).sum(1, keepdim=True) + 1e-6) for x in (weak, own)
        )
        ranked = zipf(keys, targets)
    target = reference.smoothed_target(z, y, squared=True)
    others = -reference.cross(ranked, reference.log_softmax(z, targets))
    one_hot = torch.nn.functional.one_hot(y.index[:, 0], z.shape[1]).to(z.dtype)
    smooth = 0.9 * (one_hot if y.soft is None else y.soft) + 0.1 / z.shape[1]
    weak_ce = -reference.cross(smooth, w.log_softmax(1))
    ce = reference.cross_entropy(z, y)
    parts = ((alpha, target), (beta, others), (mu, weak_ce), (ce_weight, ce))
    loss = sum(v * x for v, x in parts if v) + torch.zeros_like(ce)
    top1, top5 = reference.hits(z, y, 1), reference.hits(z, y, 5)
    terms = {"target": target, "others": others, "weak": weak_ce, "ce": ce}
    return loss, {**terms, "top1": top1, "top5": top5}


@jit
def coefficients(params, REAL: tl.constexpr):
    """The weights of the smoothed target, the ranked rest, the weak head and cross-entropy."""
    alpha, beta = param(params, 0, REAL), param(params, 1, REAL)
    return alpha, beta, param(params, 2, REAL), param(params, 4, REAL)


OP = Op(
    "uskd",
    rows,
    lambda _: ("target", "others", "weak", "ce", "top1", "top5"),
    coefficients,
    None,
    own_rows=True,
    labels=2,
    temperature=None,
)


def uskd_loss(
    student: Tensor,  # (N, C)
    weak: Tensor,  # (N, C)
    target: Tensor,  # (N,) int64 or (N, C) probabilities
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    rank: str = "released",
    ce_weight: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    return_terms: bool = False,
    backend: str | None = None,
    stored_gradient: bool = True,
) -> Loss:
    """Universal self-knowledge distillation (Yang et al. 2023), with cross-entropy.

    `weak` are the logits of the weak head on an earlier stage; they get a gradient of their own
    (mu's term), while the ranking carries none. rank: "released" ranks by the student's
    log-probability as the released code does, "paper" by its probability. Of class probabilities
    the two largest are the targets (one, where the second is 0). `kd_loss` describes the other
    arguments, the terms (here target, others, weak, ce, top1, top5, rows), the value and errors.

    Raises:
        ValueError: also for C == 2 with beta != 0, where the non-target part has a single class.
    """
    if rank not in RANKS:
        raise ValueError(f"rank must be one of {', '.join(RANKS)}, got {rank!r}")
    params = [
        weight("alpha", alpha),
        weight("beta", beta),
        weight("mu", mu),
        RANKS[rank],
        weight("ce_weight", ce_weight),
    ]
    if beta and isinstance(student, Tensor) and student.dim() == 2 and student.shape[1] == 2:
        raise ValueError("C == 2 leaves the non-target part a single class; use beta=0")
    options = Options(reduction, ignore_index, denominator, return_terms, backend, stored_gradient)
    return run(OP, [student, weak], [], target, params, options)


class USKDLoss(LossModule):
    """`uskd_loss` with its settings kept: USKDLoss(alpha=0.1)(student, weak, target)."""

    function = staticmethod(uskd_loss)
