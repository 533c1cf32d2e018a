"""SLKD: a student and its self-learning teachers (SL-Ts) under one teacher, all losses in one pass.

The student z learns from the teacher t and from the fused SL-Ts f = sum_k fusion_k s_k, each SL-T
from the teacher; KD(q, p) = T^2 KL(softmax(q / T) || softmax(p / T)):
    student: (ce_weight + fused_ce_weight) CE(z) + kd_weight KD(t, z) + fused_kd_weight KD(f, z)
    SL-T k:  ce_weight CE(s_k) + kd_weight KD(t, s_k)
The paper's L_S = L_{S<-T} + L_{S<-SL} with alpha = 0.1 in both is ce_weight = fused_ce_weight = 0.1
and kd_weight = fused_kd_weight = 0.9; the released code has 1 for both fused weights (the default)
and does not detach the SL-Ts in KD(f, z).
Memory traffic of forward and backward together: 2K + 3 elements a logit.
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
from .triton.lang import jit, tl
from .triton.rows import gated, joined, none, number, param


def rows(students, teachers, y, params):
    """The loss of each row and its terms in plain PyTorch; see `reference.py`."""
    temperature, square, kd_weight, ce_weight, fused_kd, fused_ce, detach, *fusion = params
    (z, *slts), (t,) = students, teachers

    def log_p(x):
        return (x / temperature).log_softmax(1)

    fused = sum(w * s for w, s in zip(fusion, slts, strict=True) if w)
    log_t, log_z = log_p(t), log_p(z)
    kd = square * reference.kl(log_t, log_z)
    from_slts = square * reference.kl(log_p(fused.detach() if detach else fused), log_z)
    ce = reference.cross_entropy(z, y)
    terms = {"kd": kd, "fused_kd": from_slts, "ce": ce}
    terms.update(top1=reference.hits(z, y, 1), top5=reference.hits(z, y, 5))
    parts = [(kd_weight, kd), (fused_kd, from_slts), (ce_weight + fused_ce, ce)]
    for k, s in enumerate(slts):
        own_kd, own_ce = square * reference.kl(log_t, log_p(s)), reference.cross_entropy(s, y)
        parts += [(kd_weight, own_kd), (ce_weight, own_ce)]
        terms.update({f"slt{k}_kd": own_kd, f"slt{k}_ce": own_ce})
        terms.update(
            {f"slt{k}_top1": reference.hits(s, y, 1), f"slt{k}_top5": reference.hits(s, y, 5)}
        )
    return sum(w * x for w, x in parts if w) + torch.zeros_like(ce), terms


def term_names(students: int) -> tuple[str, ...]:
    own = ("kd", "fused_kd", "ce", "top1", "top5")
    each = ("kd", "ce", "top1", "top5")
    return own + tuple(f"slt{k}_{name}" for k in range(students - 1) for name in each)


def from_stats(zs, ts, pairs, params, valid, labelled):
    """The same from the statistics of all parts of the rows; see `sharded/whole.py`."""
    temperature, square, kd_weight, ce_weight, fused_kd, fused_ce, detach, *fusion = params
    z, (t, f), step = zs[0], ts, square / temperature
    own, fused = whole.kl(z, t, pairs[0]), whole.kl(z, f, pairs[1])
    g = whole.no_gradient(z.lse)
    asked, of_fused = whole.weighted(kd_weight, own), whole.weighted(fused_kd, fused)
    g.a = step * (asked.a + of_fused.a)
    g.label = step * (asked.label + of_fused.label)
    g.others = [(-step * asked.b, 0), (-step * of_fused.b, 1)]
    ce = whole.cross_entropy(z, ce_weight + fused_ce, g)
    values, gradients = [[square * own.value, square * fused.value, ce]], [g]
    loss = whole.gated(kd_weight, values[0][0]) + whole.gated(fused_kd, values[0][1])
    loss = loss + whole.gated(ce_weight + fused_ce, ce)
    for k, s in enumerate(zs[1:]):
        own, g = whole.kl(s, t, pairs[2 + k]), whole.no_gradient(s.lse)
        asked = whole.weighted(kd_weight, own)
        g.a, g.label, g.others = step * asked.a, step * asked.label, [(-step * asked.b, 0)]
        if not detach:
            g.others.append((fusion[k] * step * of_fused.b, -1))
            pulled = whole.gated(f.p_label, f.label - z.label - fused.drift)
            g.label = g.label + whole.gated(fusion[k] * fused_kd * step, pulled)
        slt_ce = whole.cross_entropy(s, ce_weight, g)
        values.append([square * own.value, slt_ce])
        gradients.append(g)
        loss = loss + whole.gated(kd_weight, square * own.value) + whole.gated(ce_weight, slt_ce)
    return loss, values, gradients, fused.drift


@jit
def coefficients(
    params,
    fusion,
    students,
    at_one,
    hits,
    t,
    of_f,
    PULLED: tl.constexpr,
    REAL: tl.constexpr,
):
    """From the statistics of a row (triton/slkd.py) to its value, terms and gradients' factors."""
    temperature, square = param(params, 0, REAL), param(params, 1, REAL)
    kd_weight, slt_ce = param(params, 2, REAL), param(params, 3, REAL)
    fused_kd, ce_weight = param(params, 4, REAL), slt_ce + param(params, 5, REAL)
    step = square / temperature
    f_label, f, fused = of_f
    own, terms, factors = number(0, REAL), none(), none()
    for k in tl.static_range(len(students)):
        z_label, at, pair = students[k]
        at1, ce = at_one[k]
        of_ce = ce_weight if k == 0 else slt_ce
        value = square * pair[0]
        own += gated(kd_weight, value) + gated(of_ce, ce[0])
        a = gated(step * kd_weight, at[4])
        at_label = gated(step * kd_weight, pair[1]) + gated(of_ce, ce[1])
        of_fused = number(0, REAL)
        if k == 0:
            of_f_value = square * fused[0]
            own += gated(fused_kd, of_f_value)
            terms = joined(terms, (value, of_f_value, ce[0], hits[k][0], hits[k][1]))
            a += gated(step * fused_kd, at[4])
            of_fused = gated(step * fused_kd, f[4])
            at_label += gated(step * fused_kd, fused[1])
        else:
            terms = joined(terms, (value, ce[0], hits[k][0], hits[k][1]))
            if PULLED:
                # d KL(f || z) / d s_k = fusion_k / T * p^f (u_f - u_z - drift).
                reach = fusion[k - 1] * fused_kd * step
                of_fused = gated(reach, f[4])
                at_label += gated(reach * f[1], f_label - students[0][0] - fused[2])
        c = gated(of_ce, ce[2] * at1[4])
        factors = joined(
            factors, ((a, c, gated(step * kd_weight, t[4]), of_fused, -of_ce, at_label),)
        )
    return own, terms, factors


OP = Op("slkd", rows, term_names, coefficients, from_stats, own_rows=True, fusion=7)


def slkd_loss(
    student: Logits,  # (N, C)
    teacher: Tensor,  # (N, C)
    slts: Sequence[Tensor],  # K of (N, C)
    target: Tensor,  # (N,) int64 or (N, C) probabilities
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    fused_ce_weight: float = 1.0,
    fused_kd_weight: float = 1.0,
    fusion: Sequence[float] | None = None,
    detach_slts: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    t_squared: bool = True,
    return_terms: bool = False,
    backend: str | None = None,
    stored_gradient: bool = True,
) -> Loss:
    """The student's loss plus every SL-T's own; one backward() fills all gradients.

    fusion: K weights >= 0 that sum to 1 (default equal). detach_slts=False is the released code:
    the student's KD(f, z) then reaches the SL-Ts as well. A fusion weight of 0 leaves that SL-T
    out of the fusion; its own losses stay. `kd_loss` describes the other arguments, the value and
    the errors; the terms are kd, fused_kd, ce, top1, top5, and slt0_kd, slt0_ce, slt0_top1,
    slt0_top5, ...

    Raises:
        ValueError: also for fusion weights that do not sum to 1.
    """
    networks = as_list(slts, "slts")
    weights = check_weights("fusion", fusion, len(networks))
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"fusion must sum to 1, got {weights} with sum {sum(weights)}")
    t = positive("temperature", temperature)
    params = [
        t,
        scale(t, t_squared),
        weight("kd_weight", kd_weight),
        weight("ce_weight", ce_weight),
        weight("fused_kd_weight", fused_kd_weight),
        weight("fused_ce_weight", fused_ce_weight),
        float(detach_slts),
        *weights,
    ]
    options = Options(reduction, ignore_index, denominator, return_terms, backend, stored_gradient)
    return run(OP, [student, *networks], [teacher], target, params, options)


class SLKDLoss(LossModule):
    """`slkd_loss` with its settings kept: SLKDLoss(temperature=4)(student, teacher, slts, y)."""

    function = staticmethod(slkd_loss)
