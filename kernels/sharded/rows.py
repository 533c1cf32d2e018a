"""The two functions of a split loss in plain PyTorch: for GPUs, and to hold the compiled ops to.

N rows, C classes in this part. They compute in the logits' type or float32, and hold a few (N, C)
temporaries of it at a time. `merge` says what the statistics are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..op import Op
from .merge import TOP, Layout, layout
from .whole import Gradient, Known, gated


def working_type(logits: Sequence[Tensor]) -> torch.dtype:
    wide = any(x.dtype == torch.float64 for x in logits)
    return torch.float64 if wide else torch.float32


@dataclass
class Part:
    """What a pass over this part's classes reads."""

    students: list[Tensor]
    teachers: list[Tensor]  # with SLKD's fused one
    label: Tensor  # (N, C) bool: the labels that this part holds
    valid: Tensor  # (N,) bool
    place: Tensor  # (N,) int64: the label, counted from this part's first class


def read(
    op: Op,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    first: int,
    params: Sequence[float],
    ignore_index: int,
) -> Part:
    dtype = working_type([*students, *teachers])
    rows, classes = students[0].shape
    device = students[0].device
    if target is None:
        valid = torch.ones(rows, dtype=torch.bool, device=device)
        place = torch.full((rows,), -1, device=device)
    else:
        valid = target != ignore_index
        place = torch.where(valid, target - first, -1)

    def clean(x: Tensor) -> Tensor:  # an ignored row may hold anything
        return torch.where(valid[:, None], x.to(dtype), 0.0)

    zs, ts = [clean(x) for x in students], [clean(x) for x in teachers]
    if op.teacher_weights is not None:  # a teacher of weight 0 may hold anything as well
        weights = params[op.teacher_weights :]
        ts = [t if w else torch.zeros_like(t) for t, w in zip(ts, weights, strict=True)]
    if op.fusion is not None:
        fused = sum(w * s for w, s in zip(params[op.fusion :], zs[1:], strict=True) if w)
        ts.append(torch.as_tensor(fused))
    label = torch.arange(classes, device=device) == place[:, None]
    return Part(zs, ts, label, valid, place)


def rest(x: Tensor, part: Part) -> Tensor:
    return x.masked_fill(part.label, -torch.inf)


def stats(
    op: Op,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    first: int,
    classes: int,
    params: Sequence[float],
    ignore_index: int,
) -> Tensor:
    """(N, S) float64: the statistics of these classes, `first` being the first of them."""
    at = layout(op, len(students), len(teachers), list(params))
    part = read(op, students, teachers, target, first, params, ignore_index)
    size = students[0].shape[1]
    own = part.label.any(1)
    head = torch.stack([part.place, torch.full_like(part.place, size)], -1)
    columns: list[Tensor] = []
    units: list[Tensor] = []
    powers: list[Tensor] = []
    for x, temperature in zip((*part.students, *part.teachers), at.temperatures, strict=True):
        others = rest(x, part)
        peak = others.amax(1)
        shift = torch.where(torch.isneginf(peak), 0.0, peak)
        near = others - shift[:, None]
        u = near / temperature
        e = u.exp()
        value = torch.where(own, torch.where(part.label, x, 0.0).sum(1), -torch.inf)
        at_one = target is not None if len(columns) < at.students else at.teacher_at_1
        total_at_one = near.exp().sum(1) if at_one else torch.zeros_like(peak)
        columns.append(torch.stack([peak, e.sum(1), total_at_one, value], -1).double())
        units.append(u)
        powers.append(e)
    sets = torch.stack(columns, 1)
    pairs = []
    for t, z in at.pairs:
        gap = units[t] - units[z] if at.entropy else units[z]
        pairs.append(torch.where(powers[t] > 0, powers[t] * gap, 0.0).sum(1).double()[:, None])
    ranks = []
    for x in part.students:
        top = rest(x, part).topk(min(TOP, size)).values.double()
        top = torch.nn.functional.pad(top, (0, TOP - top.shape[1]), value=-torch.inf)
        rank = torch.where(own, before_label(x, part), 0)
        ranks.append(torch.cat([top, rank.double()[:, None]], 1))
    packed = torch.cat([head.double(), sets.flatten(1), *pairs, *ranks], 1)
    kept = part.valid[:, None] | (torch.arange(packed.shape[1], device=packed.device) < 2)
    return torch.where(kept, packed, 0.0)


def before_label(z: Tensor, part: Part) -> Tensor:
    """(N,): how many classes of this part come before the label it holds, at most TOP."""
    value = torch.where(part.label, z, 0.0).sum(1, keepdim=True)
    earlier = torch.arange(z.shape[1], device=z.device) < part.place[:, None]
    ahead = torch.where(earlier, ~(z < value), ~(z <= value)) & ~part.label
    return torch.where(value[:, 0].isnan(), TOP, ahead.sum(1).clamp(max=TOP))


def grad_from_stats(
    op: Op,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    target: Tensor | None,
    first: int,
    classes: int,
    merged: Tensor,
    denominator: Tensor | None,
    upstream: Tensor | None,
    params: Sequence[float],
    reduction: int,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss of the whole rows, its terms, and the gradients of this part's classes.

    merged: (N, S) statistics of all parts. reduction: 0 none, 1 mean, 2 sum. upstream: 0-dim or
    (N,). The gradients of float16 students are float32.
    """
    dtype = working_type([*students, *teachers])
    at: Layout = layout(op, len(students), len(teachers), list(params))
    part = read(op, students, teachers, target, first, params, ignore_index)
    _, sets, pairs, ranks = at.views(merged)
    known = [Known(sets[:, k], t) for k, t in enumerate(at.temperatures)]
    zs, ts = known[: at.students], known[at.students :]
    labelled = target is not None
    assert op.from_stats is not None  # refused before
    losses, values, gradients, drift = op.from_stats(
        zs, ts, pairs.unbind(1), params, part.valid, labelled
    )
    losses = torch.where(part.valid, losses, 0.0)
    count = part.valid.sum()
    divisor = count.clamp(min=1).double()
    shown = part.valid & labelled
    report: list[Tensor] = []
    for k, own in enumerate(values):
        rank = ranks[:, k, TOP]
        report += [torch.where(part.valid, v, 0.0).sum() / divisor for v in own]
        report += [((rank < n) & shown).sum().double() for n in (1, TOP)]
    terms = torch.stack([*report, count.double()]).to(dtype)
    scale = torch.ones_like(divisor)
    if reduction == 1:
        scale = 1 / (divisor if denominator is None else denominator.reshape(()).double())
    loss = (losses if reduction == 0 else losses.sum() * scale).to(dtype)
    if not with_gradient:
        return loss, terms, []
    weight = scale.expand(losses.shape)
    if upstream is not None:
        weight = weight * upstream
    return loss, terms, write(part, students, zs, ts, gradients, weight, drift)


def write(
    part: Part,
    students: Sequence[Tensor],
    zs: Sequence[Known],
    ts: Sequence[Known],
    gradients: Sequence[Gradient],
    weight: Tensor,
    drift: Tensor | None,
) -> list[Tensor]:
    """The gradients, each of its student's type; weight: (N,) of each row's loss."""
    dtype = part.students[0].dtype

    def near(x: Tensor, known: Known) -> Tensor:
        return rest(x, part) - known.peak.to(dtype)[:, None]

    def column(x: Tensor) -> Tensor:
        return (weight * x).to(dtype)[:, None]

    exps = [(near(x, t) / t.temperature).exp() for x, t in zip(part.teachers, ts, strict=True)]
    if drift is not None:
        of_f, of_z = near(part.teachers[1], ts[1]), near(part.students[0], zs[0])
        gap = of_f / ts[1].temperature - of_z / zs[0].temperature - drift.to(dtype)[:, None]
        exps.append(torch.where(exps[1] > 0, exps[1] * gap, 0.0))
    made = []
    for x, z, g, student in zip(part.students, zs, gradients, students, strict=True):
        close = near(x, z)
        out = column(g.a) * (close / z.temperature).exp()
        for scale, k in g.others:
            out = out + gated(column(scale), exps[k])
        out = out + column(g.c) * close.exp()
        out = torch.where(part.label, column(g.label), out)
        out = torch.where(part.valid[:, None], out, 0.0)
        half = student.dtype == torch.float16
        made.append(out.to(torch.float32 if half else student.dtype))
    return made
