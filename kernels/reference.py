"""What the plain-PyTorch forms of the losses share. N rows, C classes.

They are the specification: any floating type, double backward, torch.func. A teacher probability of
0 contributes exactly 0, and every log(1 - p) is a difference of log-sum-exps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """The target of a call, for all rows."""

    index: Tensor  # (N, k) int64: the label, or the k largest of class probabilities
    value: Tensor  # (N, k): their probabilities (1 for a label)
    soft: Tensor | None  # (N, C) class probabilities, or None
    valid: Tensor  # (N,) bool: rows that count


def labels(target: Tensor, ignore_index: int, dtype: torch.dtype, wanted: int = 1) -> Labels:
    """Reads (N,) class indices or (N, C) class probabilities; of these the `wanted` largest."""
    if target.dim() == 2:
        soft = target.to(dtype)
        # A stable sort: of equal probabilities the lower class is the label.
        value, index = soft.sort(dim=1, descending=True, stable=True)
        value, index = value[:, :wanted], index[:, :wanted]
        return Labels(index, value, soft, torch.ones_like(target[:, 0], dtype=torch.bool))
    valid = target != ignore_index
    index = torch.where(valid, target, 0)[:, None]
    return Labels(index, torch.ones_like(index, dtype=dtype), None, valid)


def marked(index: Tensor, value: Tensor, classes: int) -> Tensor:
    """(N, C) bool: the labels of a row; of a mixed label those with a probability above 0."""
    hit = torch.nn.functional.one_hot(index, classes).bool()  # (N, k, C)
    present = (value > 0) | (torch.arange(value.shape[1], device=value.device) == 0)
    return (hit & present[..., None]).any(1)


def log_softmax(x: Tensor, drop: Tensor) -> Tensor:
    """Row-wise log-softmax of x (N, C) over the classes not in `drop` (N, C); -inf elsewhere."""
    rest = x.masked_fill(drop, -torch.inf)
    empty = torch.isneginf(rest).all(1, keepdim=True)
    return torch.where(empty, rest, torch.where(empty, 0.0, rest).log_softmax(1))


def log_softmax_rest(x: Tensor, label: Tensor) -> Tensor:
    """(N,): log of the softmax's mass outside `label` (N, C), a difference of log-sum-exps."""
    peak = x.detach().amax(1, keepdim=True)
    x = x - torch.where(peak.isinf(), 0.0, peak)
    rest = x.masked_fill(label, -torch.inf)
    empty = torch.isneginf(rest).all(1)
    lse = torch.where(empty[:, None], 0.0, rest).logsumexp(1)
    return torch.where(empty, -torch.inf, lse - x.logsumexp(1))


def smoothed_target(student: Tensor, y: Labels, squared: bool) -> Tensor:
    """(N,): sum over the targets t of -w_t log S_t, w_t = S_t + V_t - mean of S_t, w constant.

    The mean runs over the rows that count; `squared` takes S_t^2 in w_t. w_t = 0 where V_t = 0.
    """
    log_p = student.log_softmax(1).gather(1, y.index)  # (N, k)
    present = y.value > 0
    score = log_p.detach().exp() ** (2 if squared else 1)
    counted = torch.where(y.valid[:, None] & present, score, 0.0)
    mean = counted.sum(0) / y.valid.sum().clamp(min=1)
    w = torch.where(present, score + y.value - mean, 0.0)
    return -cross(w, log_p)


def cross(weights: Tensor, x: Tensor) -> Tensor:
    """(N,): sum over the classes of weights * x, where a weight of 0 gives exactly 0."""
    used = weights != 0
    return torch.where(used, weights * torch.where(used, x, 0.0), 0.0).sum(1)


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """(N,): KL(q || p) from log-probabilities (N, C)."""
    used = ~torch.isneginf(log_q)
    gap = torch.where(used, torch.where(used, log_q, 0.0) - log_p, 0.0)
    return torch.where(used, log_q.exp() * gap, 0.0).sum(1)


def cross_entropy(student: Tensor, y: Labels) -> Tensor:
    """(N,): cross-entropy at T = 1 against labels or class probabilities."""
    log_p = student.log_softmax(1)
    if y.soft is not None:
        return -cross(y.soft, log_p)
    return -log_p.gather(1, y.index)[:, 0]


def with_cross_entropy(
    kd: Tensor, kd_weight: float, student: Tensor, y: Labels | None, ce_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows' loss and terms of a distillation term and cross-entropy, of which a weight of 0
    leaves out whatever the term is; without labels of the first alone.
    """
    none = student[:, :0].sum(1).to(kd.dtype)  # 0, whose gradient is 0
    loss = kd_weight * kd if kd_weight else none
    if y is None:
        return loss, {"kd": kd, "ce": none, "top1": none, "top5": none}
    ce = cross_entropy(student, y)
    if ce_weight:
        loss = loss + ce_weight * ce
    return loss, {"kd": kd, "ce": ce, "top1": hits(student, y, 1), "top5": hits(student, y, 5)}


def hits(student: Tensor, y: Labels, k: int) -> Tensor:
    """(N,) float: 1 where the label is among the k largest logits.

    Ties go to the lower index. NaN is above any number, and a label at NaN is never right.
    """
    z = student.detach()
    label = y.index[:, :1]
    value = z.gather(1, label)
    place = torch.arange(z.shape[1], device=z.device)
    ahead = torch.where(place < label, ~(z < value), ~(z <= value)) & (place != label)
    return ((ahead.sum(1) < k) & ~value[:, 0].isnan()).to(z.dtype)
