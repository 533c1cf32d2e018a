"""Every loss in numpy straight from the published formulas: value and gradient of each row.

Nothing here comes from the package. N rows, C classes. The type of the arrays is the type of the
arithmetic: float64 is the truth, float32 is what the careful formula gives in float32. Conventions:
a teacher probability of 0 contributes exactly 0; a row marked IGNORE has loss and gradient 0 and
leaves batch means and counts; NaN stays NaN. Gradients are of the rows' own losses: (N, C) each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

IGNORE = -100
Array = np.ndarray


@dataclass
class Rows:
    """Losses of all rows, the gradient of each set of student logits, and the terms by name."""

    loss: Array  # (N,)
    gradients: list[Array]  # (N, C) each
    terms: dict[str, Array]  # (N,) each; "top1" and "top5" are 0 or 1
    weight: Array | None = None  # (N,): what a row counts for, of a loss that says so


@dataclass
class Labels:
    index: Array  # (N, k): the label, or the k largest of class probabilities, lower index first
    value: Array  # (N, k)
    soft: Array  # (N, C): class probabilities, one-hot for a label
    valid: Array  # (N,)

    def one_hot(self, k: int) -> Array:
        return np.arange(self.soft.shape[1]) == self.index[:, k : k + 1]


def read(target: Array, z: Array, wanted: int = 1) -> Labels:
    rows = np.arange(len(z))[:, None]
    if target.ndim == 2:
        soft = target.astype(z.dtype)
        index = np.argsort(-soft, axis=1, kind="stable")[:, :wanted]
        return Labels(index, soft[rows, index], soft, np.ones(len(z), bool))
    valid = target != IGNORE
    index = np.where(valid, target, 0)[:, None]
    soft = np.zeros_like(z)
    soft[rows, index] = 1
    return Labels(index, soft[rows, index], soft, valid)


def log_softmax(x: Array, keep: Array | None = None) -> Array:
    """(N, C): log-softmax of the classes in `keep`, -inf elsewhere and in rows without mass."""
    kept = x if keep is None else np.where(keep, x, -np.inf)
    peak = kept.max(1, keepdims=True)
    peak = np.where(peak == -np.inf, 0, peak)
    total = np.exp(kept - peak).sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total == 0, -np.inf, (kept - peak) - np.log(total))


def log_mass(x: Array, keep: Array) -> Array:
    """(N,): log of the softmax's mass over `keep`, as a difference of log-sum-exps."""

    def lse(kept):
        peak = kept.max(1)
        peak = np.where(peak == -np.inf, 0, peak)
        with np.errstate(divide="ignore"):
            return peak, np.log(np.exp(kept - peak[:, None]).sum(1))

    (peak, part), (top, whole) = lse(np.where(keep, x, -np.inf)), lse(x)
    return (peak - top) + (part - whole)


def log_mass_of(log_x: Array) -> Array:
    """(N,): log of the sum of a row's exp(log_x)."""
    peak = log_x.max(1)
    peak = np.where(peak == -np.inf, 0, peak)
    return peak + np.log(np.exp(log_x - peak[:, None]).sum(1))


def dot(weights: Array, x: Array) -> Array:
    """(N,): sum of weights * x, a weight of 0 giving exactly 0 whatever x is."""
    used = weights != 0
    return (np.where(used, weights, 0) * np.where(used, x, 0)).sum(1)


def kl(log_q: Array, log_p: Array) -> Array:
    q = np.exp(log_q)
    with np.errstate(invalid="ignore"):
        gap = log_q - log_p
    return dot(q, gap)


def at(x: Array, index: Array) -> Array:
    return x[np.arange(len(x))[:, None], index]


def cross_entropy(z: Array, y: Labels) -> tuple[Array, Array]:
    log_p = log_softmax(z)
    gradient = y.soft.sum(1, keepdims=True) * np.exp(log_p) - y.soft
    return -dot(y.soft, log_p), gradient


def hits(z: Array, y: Labels) -> dict[str, Array]:
    """The label's place counts whatever is not below it: larger, NaN, or as large and earlier.

    A label whose logit is NaN is never right.
    """
    index = y.index[:, :1]
    value = at(z, index)
    earlier = np.arange(z.shape[1]) < index
    ahead = np.where(earlier, ~(z < value), ~(z <= value))
    ahead &= np.arange(z.shape[1]) != index
    rank = np.where(np.isnan(value[:, 0]), np.inf, ahead.sum(1))
    return {"top1": (rank < 1).astype(z.dtype), "top5": (rank < 5).astype(z.dtype)}


def gated(*parts: tuple[float, Array]) -> Array:
    """Sum of weight * x; a weight of 0 leaves its term out whatever it is."""
    total = np.zeros_like(parts[0][1])
    for weight, x in parts:
        total = total + (weight * x if weight else 0)
    return total


def finish(y: Labels, loss: Array, gradients: Sequence[Array], terms: dict[str, Array]) -> Rows:
    def of(x):
        return np.where(y.valid if x.ndim == 1 else y.valid[:, None], x, 0)

    return Rows(of(loss), [of(g) for g in gradients], {k: of(v) for k, v in terms.items()})


def kd(
    students,
    teachers,
    target,
    *,
    temperature=4.0,
    kd_weight=1.0,
    ce_weight=0.0,
    teacher_weights=None,
    t_squared=True,
):
    (z,) = students
    weights = teacher_weights or [1 / len(teachers)] * len(teachers)
    square = temperature**2 if t_squared else 1.0
    y = read(np.zeros(len(z), int) if target is None else target, z)
    log_p = log_softmax(z / temperature)
    log_q = [log_softmax(t / temperature) for t in teachers]
    pairs = [(square * w, kl(q, log_p)) for w, q in zip(weights, log_q, strict=True)]
    step = square / temperature
    steps = [(step * w, np.exp(log_p) - np.exp(q)) for w, q in zip(weights, log_q, strict=True)]
    value, (ce, ce_step) = gated(*pairs), cross_entropy(z, y)
    loss = gated((kd_weight, value), (ce_weight, ce))
    gradient = gated((kd_weight, gated(*steps)), (ce_weight, ce_step))
    return finish(y, loss, [gradient], {"kd": value, "ce": ce, **hits(z, y)})


def dkd(
    students,
    teachers,
    target,
    *,
    alpha=1.0,
    beta=8.0,
    temperature=4.0,
    ce_weight=0.0,
    t_squared=True,
):
    (z,), (t,) = students, teachers
    square = temperature**2 if t_squared else 1.0
    y = read(target, z)
    label, rest = y.one_hot(0), ~y.one_hot(0)

    def pair(x):  # (N, 2): log b, log(1 - b)
        return np.stack([at(log_softmax(x), y.index)[:, 0], log_mass(x, rest)], 1)

    pair_z, pair_t = pair(z / temperature), pair(t / temperature)
    log_p, log_q = log_softmax(z / temperature, rest), log_softmax(t / temperature, rest)
    tckd, nckd = square * kl(pair_t, pair_z), square * kl(log_q, log_p)
    gap = (np.exp(pair_z[:, 0]) - np.exp(pair_t[:, 0]))[:, None]
    p, q = np.exp(log_p), np.exp(log_q)
    mass = (
        q.sum(1, keepdims=True) > 0
    )  # without any of the teacher's NCKD is 0, and so is its gradient
    mass |= np.isnan(q).any(1, keepdims=True)
    step = square / temperature
    ce, ce_step = cross_entropy(z, y)
    target_step = step * np.where(label, gap, -gap * p)
    others_step = step * np.where(mass, p - q, 0)
    loss = gated((alpha, tckd), (beta, nckd), (ce_weight, ce))
    gradient = gated((alpha, target_step), (beta, others_step), (ce_weight, ce_step))
    return finish(y, loss, [gradient], {"tckd": tckd, "nckd": nckd, "ce": ce, **hits(z, y)})


def wttm(
    students,
    teachers,
    target,
    *,
    temperature=10.0,
    kd_weight=1.0,
    ce_weight=0.0,
    weighted=True,
):
    (z,), (t,) = students, teachers
    y = read(np.zeros(len(z), int) if target is None else target, z)
    log_p, log_powered = log_softmax(z), log_softmax(t) / temperature
    log_u = log_mass_of(log_powered)
    log_q = log_powered - log_u[:, None]
    u = np.exp(log_u) if weighted else np.ones(len(z))
    value, (ce, ce_step) = u * kl(log_q, log_p), cross_entropy(z, y)
    loss = gated((kd_weight, value), (ce_weight, ce))
    step = u[:, None] * (np.exp(log_p) - np.exp(log_q))
    gradient = gated((kd_weight, step), (ce_weight, ce_step))
    found = finish(y, loss, [gradient], {"kd": value, "ce": ce, **hits(z, y)})
    return replace(found, weight=np.where(y.valid, u, 0))


def nkd(students, teachers, target, *, gamma=1.5, temperature=1.0, ce_weight=0.0, t_squared=True):
    (z,), (t,) = students, teachers
    square = temperature**2 if t_squared else 1.0
    y = read(target, z)
    label, rest = y.one_hot(0), ~y.one_hot(0)
    log_s, v = log_softmax(z), at(np.exp(log_softmax(t)), y.index)
    log_p = log_softmax(z / temperature, rest)
    p, q = np.exp(log_p), np.exp(log_softmax(t / temperature, rest))
    mass = (q.sum(1, keepdims=True) > 0) | np.isnan(q).any(1, keepdims=True)
    own = -dot(v, at(log_s, y.index))
    others = -square * dot(q, log_p)
    ce, ce_step = cross_entropy(z, y)
    own_step = v * (np.exp(log_s) - label)
    others_step = square / temperature * np.where(mass, p - q, 0)
    loss = gated((1.0, own), (gamma, others), (ce_weight, ce))
    gradient = gated((1.0, own_step), (gamma, others_step), (ce_weight, ce_step))
    return finish(y, loss, [gradient], {"target": own, "others": others, "ce": ce, **hits(z, y)})


def smoothed(z: Array, y: Labels, squared: bool) -> tuple[Array, Array]:
    """sum_t -w_t log S_t, constant w_t = S_t (or its square) + V_t - batch mean; its gradient."""
    log_s = log_softmax(z)
    value, gradient = np.zeros_like(z[:, 0]), np.zeros_like(z)
    for k in range(y.index.shape[1]):
        log_t = at(log_s, y.index[:, k : k + 1])[:, 0]
        present = y.value[:, k] > 0
        score = np.exp(log_t) ** (2 if squared else 1)
        counted = np.where(y.valid & present, score, 0)
        w = score + y.value[:, k] - counted.sum() / max(y.valid.sum(), 1)
        w = np.where(present, w, 0)[:, None]
        value = value - dot(w, log_t[:, None])
        gradient = gradient + w * (np.exp(log_s) - y.one_hot(k))
    return value, gradient


def tf_nkd(students, teachers, target, *, weight=1.0, ce_weight=0.0):
    (z,) = students
    y = read(target, z, wanted=2)
    value, step = smoothed(z, y, squared=False)
    ce, ce_step = cross_entropy(z, y)
    loss = gated((weight, value), (ce_weight, ce))
    gradient = gated((weight, step), (ce_weight, ce_step))
    return finish(y, loss, [gradient], {"target": value, "ce": ce, **hits(z, y)})


def zipf(keys: Array, drop: Array) -> Array:
    """(N, C): 1 / rank by falling key, all classes ranked, the targets dropped, summing to 1."""
    weights = np.empty_like(keys)
    keys = np.where(np.isnan(keys), np.inf, keys)  # of a target that cannot be; as torch sorts
    for row, key in zip(weights, keys, strict=True):
        order = sorted(range(len(key)), key=lambda j, key=key: -key[j])
        for rank, j in enumerate(order):
            row[j] = 1 / (rank + 1)
    weights = np.where(drop, 0, weights)
    return weights / weights.sum(1, keepdims=True)


def uskd(
    students, teachers, target, *, alpha=1.0, beta=0.1, mu=0.005, rank="released", ce_weight=0.0
):
    z, w = students
    y = read(target, z, wanted=2)
    drop = y.one_hot(0)
    if y.index.shape[1] == 2:
        drop = drop | (y.one_hot(1) & (y.value[:, 1:] > 0))
    log_s, weak = log_softmax(z), np.exp(log_softmax(w))
    own = np.exp(log_s) if rank == "paper" else log_s
    keys = sum(x / (1 - np.where(drop, x, 0).sum(1, keepdims=True) + 1e-6) for x in (weak, own))
    ranked = zipf(keys, drop)
    log_p = log_softmax(z, ~drop)
    smooth = 0.9 * y.soft + 0.1 / z.shape[1]
    value, step = smoothed(z, y, squared=True)
    others, weak_ce = -dot(ranked, log_p), -dot(smooth, log_softmax(w))
    ce, ce_step = cross_entropy(z, y)
    loss = gated((alpha, value), (beta, others), (mu, weak_ce), (ce_weight, ce))
    gradient = gated((alpha, step), (beta, np.exp(log_p) - ranked), (ce_weight, ce_step))
    weak_step = mu * (smooth.sum(1, keepdims=True) * weak - smooth)
    terms = {"target": value, "others": others, "weak": weak_ce, "ce": ce}
    return finish(y, loss, [gradient, weak_step], {**terms, **hits(z, y)})


def slkd(
    students,
    teachers,
    target,
    *,
    temperature=4.0,
    ce_weight=0.1,
    kd_weight=0.9,
    fused_ce_weight=1.0,
    fused_kd_weight=1.0,
    fusion=None,
    detach_slts=True,
    t_squared=True,
):
    (z, *slts), (t,) = students, teachers
    fusion = fusion or [1 / len(slts)] * len(slts)
    square = temperature**2 if t_squared else 1.0
    step = square / temperature
    y = read(target, z)
    f = sum(w * s for w, s in zip(fusion, slts, strict=True) if w)
    log_z, log_t, log_f = (log_softmax(x / temperature) for x in (z, t, f))
    ce, ce_step = cross_entropy(z, y)
    own, fused = square * kl(log_t, log_z), square * kl(log_f, log_z)
    weight = ce_weight + fused_ce_weight
    loss = gated((kd_weight, own), (fused_kd_weight, fused), (weight, ce))
    p, q, a = np.exp(log_z), np.exp(log_t), np.exp(log_f)
    steps = ((kd_weight, step * (p - q)), (fused_kd_weight, step * (p - a)), (weight, ce_step))
    gradients = [gated(*steps)]
    with np.errstate(invalid="ignore"):
        ratio = np.where(a > 0, log_f - log_z, 0)  # r of d/ds_k = fusion_k * a * (r - <a, r>)
    pull = step * np.where(a > 0, a * (ratio - dot(a, ratio)[:, None]), 0)
    terms = {"kd": own, "fused_kd": fused, "ce": ce, **hits(z, y)}
    for k, s in enumerate(slts):
        log_s = log_softmax(s / temperature)
        slt_kd, (slt_ce, slt_step) = square * kl(log_t, log_s), cross_entropy(s, y)
        loss = loss + gated((kd_weight, slt_kd), (ce_weight, slt_ce))
        reach = 0.0 if detach_slts else fused_kd_weight * fusion[k]
        back = ((kd_weight, step * (np.exp(log_s) - q)), (ce_weight, slt_step), (reach, pull))
        gradients.append(gated(*back))
        of_slt = {"kd": slt_kd, "ce": slt_ce, **hits(s, y)}
        terms.update({f"slt{k}_{name}": v for name, v in of_slt.items()})
    return finish(y, loss, gradients, terms)


ORACLE: dict[str, Callable[..., Rows]] = {
    "kd": kd,
    "dkd": dkd,
    "nkd": nkd,
    "wttm": wttm,
    "tf_nkd": tf_nkd,
    "uskd": uskd,
    "slkd": slkd,
}
