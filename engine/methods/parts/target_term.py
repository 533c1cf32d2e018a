"""The two halves of a binary cross-entropy at the target class, as NKD's authors separate them."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ....kernels.reference import log_softmax_rest

Form = Literal["t1", "t2", "t1+t2"]


def target_probability(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) float32: the probability at T = 1 that logits (N, C) give the target; no gradient."""
    return logits.detach().float().softmax(1).gather(1, target[:, None])[:, 0]


def target_loss(student: Tensor, target: Tensor, weight: Tensor, form: Form) -> Tensor:
    """Batch mean (0-dim, float32) of T1 = -w log S_t, of T2 = -(1 - w) log(1 - S_t), or of both.

    S_t is what the student's logits (N, C) give the target, `weight` (N,) are the w. Yang et al.
    2023, "From Knowledge Distillation to Self-Knowledge Distillation", appendix: NKD and USKD have
    T1, DKD has T1 + T2. log(1 - S_t) is a difference of log-sum-exps.
    """
    logits = student.float()
    found = logits.new_zeros(())
    if form != "t2":
        log_p = F.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
        found = found - (weight * log_p).mean()
    if form != "t1":
        rest = log_softmax_rest(logits, F.one_hot(target, logits.shape[1]).bool())
        found = found - ((1 - weight) * rest).mean()
    return found
