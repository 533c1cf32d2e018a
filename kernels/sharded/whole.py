"""Whole rows as the statistics of their parts give them, in float64, for `from_stats` of each loss.

The same maps as in csrc/losses/, over all rows at once. Every tensor is (N,); a gradient is, for
j != y, a exp((z_j - peak) / T) + c exp(z_j - peak) + the rows in `others`, and `label` at y.
`from_stats` returns the rows' losses; each student's terms; each student's Gradient; and SLKD's D
of the fused teacher, or None.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .merge import origin


class Known:
    """One set of logits as the whole rows have it: the softmax at T and at T = 1."""

    def __init__(self, of: Tensor, temperature: float) -> None:
        self.temperature, self.peak = temperature, origin(of)
        self.total = of[:, 1]
        self.log_rest = of[:, 1].log()
        self.label = (of[:, 3] - self.peak) / temperature  # u_y
        self.lse = torch.logaddexp(self.log_rest, self.label)
        self.at_label = of[:, 3] - self.peak
        self.lse_at_one = torch.logaddexp(of[:, 2].log(), self.at_label)
        self.log_label = self.at_label - self.lse_at_one  # log p_y at T = 1
        self.unit, self.unit_at_one = (-self.lse).exp(), (-self.lse_at_one).exp()
        self.p_label = (self.label - self.lse).exp()


def gated(weight: Tensor | float, x: Tensor) -> Tensor:
    """weight * x, exactly 0 where the weight is 0."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * x)
    return weight * x if weight else torch.zeros_like(x)


@dataclass
class Kl:
    """KL(t || z): value (N,), and T * d/dz_j = a e_z,j - b e_t,j, `label` at the label."""

    value: Tensor
    a: Tensor
    b: Tensor
    label: Tensor
    drift: Tensor


def kl(z: Known, t: Known, pair: Tensor) -> Kl:
    drift = gated(t.unit, pair) + gated(t.p_label, t.label - z.label)
    return Kl(drift + (z.lse - t.lse), z.unit, t.unit, z.p_label - t.p_label, drift)


def weighted(weight: Tensor | float, x: Kl) -> Kl:
    """Its gradient under a weight, of which 0 leaves it out whatever it is; its value as it was."""
    a, b, label = (gated(weight, y) for y in (x.a, x.b, x.label))
    return replace(x, a=a, b=b, label=label)


@dataclass
class Gradient:
    """Of one student: the coefficients of its exponentials and of other rows, and its label."""

    a: Tensor
    c: Tensor
    label: Tensor
    others: list[tuple[Tensor, int]]  # (N,) of the exponentials of teacher k; SLKD's pull is -1


def cross_entropy(z: Known, weight: float, g: Gradient) -> Tensor:
    if weight:
        g.c = g.c + weight * z.unit_at_one
        g.label = g.label + weight * z.log_label.expm1()
    return -z.log_label


def no_gradient(like: Tensor) -> Gradient:
    zero = torch.zeros_like(like)
    return Gradient(zero, zero, zero, [])
