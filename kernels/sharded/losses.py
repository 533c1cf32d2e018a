"""Each split loss and its coefficients from the statistics of whole rows, in float64.

The same maps as in csrc/losses/, over all rows at once. Every tensor is (N,); a gradient is, for
j != y, a exp((z_j - peak) / T) + c exp(z_j - peak) + the rows in `others`, and `label` at y.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .merge import origin


class Known:
    """One set of logits as the whole rows have it: the softmax at T and at T = 1."""

    def __init__(self, of: Tensor, temperature: float) -> None:
        self.peak = origin(of)
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


# The rows' losses; for each student its terms and its gradient; SLKD's D of the fused teacher.
Values = tuple[Tensor, list[list[Tensor]], list[Gradient], Tensor | None]


def no_gradient(like: Tensor) -> Gradient:
    zero = torch.zeros_like(like)
    return Gradient(zero, zero, zero, [])


def kd(zs, ts, pairs, params, valid, labelled) -> Values:
    temperature, square, kd_weight, ce_weight, *weights = params
    (z,), g = zs, no_gradient(zs[0].lse)
    value = torch.zeros_like(z.lse)
    for k, w in enumerate(weights):
        if w == 0:
            continue
        pair, step = kl(z, ts[k], pairs[k]), kd_weight * w * square / temperature
        value = value + w * square * pair.value
        g.a = g.a + gated(step, pair.a)
        g.label = g.label + gated(step, pair.label)
        g.others.append((-gated(step, pair.b), k))
    ce = cross_entropy(z, ce_weight, g) if labelled else torch.zeros_like(value)
    return gated(kd_weight, value) + gated(ce_weight, ce), [[value, ce]], [g], None


def dkd(zs, ts, pairs, params, valid, labelled) -> Values:
    temperature, square, alpha, beta, ce_weight = params
    (z,), (t,), step = zs, ts, square / temperature
    q_rest = (t.log_rest - t.lse).exp()
    ratio = gated(q_rest, (t.log_rest - t.lse) - (z.log_rest - z.lse))
    tckd = square * (gated(t.p_label, (t.label - t.lse) - (z.label - z.lse)) + ratio)
    none, empty = t.total == 0, z.total == 0
    b, own = torch.where(none, 0.0, 1 / t.total), torch.where(empty, 0.0, 1 / z.total)
    nckd = pairs[0] * b + (z.log_rest - t.log_rest)
    nckd = square * torch.where(none, 0.0, torch.where(empty, torch.inf, nckd))
    gap = z.p_label - t.p_label
    a = step * (gated(beta, torch.where(none, 0.0, own)) - alpha * gap * own)
    g = Gradient(a, torch.zeros_like(a), step * alpha * gap, [(-step * beta * b, 0)])
    ce = cross_entropy(z, ce_weight, g)
    loss = gated(alpha, tckd) + gated(beta, nckd) + gated(ce_weight, ce)
    return loss, [[tckd, nckd, ce]], [g], None


def nkd(zs, ts, pairs, params, valid, labelled) -> Values:
    temperature, square, gamma, ce_weight = params
    (z,), (t,), step = zs, ts, gamma * square / temperature
    weight = t.log_label.exp()
    target = gated(weight, -z.log_label)
    none, empty = t.total == 0, z.total == 0
    b = torch.where(none, 0.0, 1 / t.total)
    others = torch.where(empty, torch.inf, z.log_rest + pairs[0] * b)
    others = square * torch.where(none, 0.0, others)
    a = step * torch.where(none | empty, 0.0, 1 / z.total)
    g = Gradient(a, weight * z.unit_at_one, weight * z.log_label.expm1(), [(-step * b, 0)])
    ce = cross_entropy(z, ce_weight, g)
    loss = target + gated(gamma, others) + gated(ce_weight, ce)
    return loss, [[target, others, ce]], [g], None


def tf_nkd(zs, ts, pairs, params, valid, labelled) -> Values:
    gain, ce_weight = params
    (z,), g = zs, no_gradient(zs[0].lse)
    score = torch.where(valid, z.log_label.exp(), 0.0)
    w = score + 1 - score.sum() / valid.sum().clamp(min=1)
    target = gated(w, -z.log_label)
    g.c, g.label = gain * w * z.unit_at_one, gain * w * z.log_label.expm1()
    ce = cross_entropy(z, ce_weight, g)
    return gated(gain, target) + gated(ce_weight, ce), [[target, ce]], [g], None


def slkd(zs, ts, pairs, params, valid, labelled) -> Values:
    temperature, square, kd_weight, ce_weight, fused_kd, fused_ce, detach, *fusion = params
    z, (t, f), step = zs[0], ts, square / temperature
    own, fused = kl(z, t, pairs[0]), kl(z, f, pairs[1])
    g = no_gradient(z.lse)
    g.a = step * (kd_weight * own.a + fused_kd * fused.a)
    g.label = step * (kd_weight * own.label + fused_kd * fused.label)
    g.others = [(-step * kd_weight * own.b, 0), (-step * fused_kd * fused.b, 1)]
    ce = cross_entropy(z, ce_weight + fused_ce, g)
    values, gradients = [[square * own.value, square * fused.value, ce]], [g]
    loss = gated(kd_weight, values[0][0]) + gated(fused_kd, values[0][1])
    loss = loss + gated(ce_weight + fused_ce, ce)
    for k, s in enumerate(zs[1:]):
        own, g = kl(s, t, pairs[2 + k]), no_gradient(s.lse)
        g.a, g.label = step * kd_weight * own.a, step * kd_weight * own.label
        g.others = [(-step * kd_weight * own.b, 0)]
        if not detach:
            g.others.append((fusion[k] * fused_kd * step * fused.b, -1))
            pulled = gated(f.p_label, f.label - z.label - fused.drift)
            g.label = g.label + fusion[k] * fused_kd * step * pulled
        slt_ce = cross_entropy(s, ce_weight, g)
        values.append([square * own.value, slt_ce])
        gradients.append(g)
        loss = loss + gated(kd_weight, square * own.value) + gated(ce_weight, slt_ce)
    return loss, values, gradients, fused.drift


LOSSES: dict[str, Callable[..., Values]] = {
    "kd": kd,
    "dkd": dkd,
    "nkd": nkd,
    "tf_nkd": tf_nkd,
    "slkd": slkd,
}
