"""Plain cross-entropy: the baseline without a teacher, and how teachers are trained."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .method import Method, Now, Outputs, Terms
from .parts.labels import hard


class CE(Method):
    """Cross-entropy of the student with the labels."""

    name: Literal["ce"] = "ce"

    @property
    def takes_soft_labels(self) -> bool:
        return True

    def loss(self, out: Outputs, target: Tensor, now: Now) -> tuple[Tensor, Terms]:
        return labelled(out.student, target)


def labelled(logits: Tensor, target: Tensor) -> tuple[Tensor, Terms]:
    """The mean cross-entropy of logits (N, C) in float32, and the terms ce, top1, top5, rows.

    `target` is (N,) or class probabilities (N, C); of these the largest is the right class.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, target)
    with torch.no_grad():
        rank = (logits > logits.gather(1, hard(target)[:, None])).sum(1)  # (N,)
        terms = {
            "ce": loss.detach(),
            "top1": (rank < 1).sum(),
            "top5": (rank < 5).sum(),
            "rows": torch.full_like(rank[:1], len(target)).sum(),
        }
    return loss, terms
