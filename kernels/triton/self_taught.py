"""The rows of the losses whose student teaches itself, tf-NKD and USKD, in Triton.

Both weigh a row's targets t by S_t less its batch mean: `scores` reads the rows and leaves S_t of
each, their means and the count of valid rows; the second launch writes the gradient. A mixed label
has two targets, and of these neither is in the sums over the rest.
"""

from .batch import count_valid, is_last, sum_rows
from .lang import jit, tl
from .rows import (
    INF,
    LOG2E,
    element,
    gated,
    joined,
    none,
    number,
    shift_of,
    soften,
    split,
    tile,
)
from .target import read_label, second_label


@jit
def read_targets(
    target,
    row,
    stride,
    ignore,
    classes,
    TARGET: tl.constexpr,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):
    """Both classes (-1: there is no second), their probabilities, the rest's; the row counts."""
    y, value, rest, valid = read_label(
        target, row, stride, ignore, classes, TARGET, WHOLE, REAL, BLOCK, ONE
    )
    other, value2 = tl.full((), -1, tl.int32), tl.full((), 0, REAL)
    if TARGET == 2:
        other, value2, rest = second_label(target, row, stride, classes, y, WHOLE, REAL, BLOCK, ONE)
    return (y, other), (value, value2), rest, valid


@jit
def label_logits(x, row, stride, ys, TARGET: tl.constexpr, WHOLE: tl.constexpr, REAL: tl.constexpr):
    """Those of both targets, -inf where there is none, and the larger one."""
    first = element(x, row, stride, ys[0], WHOLE, REAL)
    if TARGET == 2:
        second = element(x, row, stride, tl.maximum(ys[1], 0), WHOLE, REAL)
        second = tl.where(ys[1] < 0, -INF, second)
        return (first, second), tl.where(second > first, second, first)
    else:
        return (first, tl.full((), -INF, REAL)), first


@jit
def join(total, labels, now, TARGET: tl.constexpr):
    """The softmax at T = 1 of a row whose targets stand apart from `total`, the rest's sum.

    Returns the log-sum-exp, both log p_t, both p_t, 1 - p_y of a single label, and the factor of
    e_j in p_j.
    """
    far, far2 = labels[0] - now, labels[1] - now
    if TARGET == 1:
        at = split(total, far)
        return at[0], (at[3], labels[1]), (at[1], number(0, far.dtype)), at[2], at[4]
    else:
        high = tl.maximum(tl.maximum(far, far2), 0.0)
        unit = tl.exp(-high)
        whole = total * unit + tl.exp(far - high) + tl.exp(far2 - high)
        lse = high + tl.log(whole)
        logs = (far - lse, far2 - lse)
        return lse, logs, (tl.exp(logs[0]), tl.exp(logs[1])), 1 - tl.exp(logs[0]), unit / whole


@jit(do_not_specialize=["rows", "units", "target_stride", "stride", "ignore"])
def scores(
    student,  # (N, C)
    target,  # (N,) or (N, C)
    values,  # (N, 2): S_t of both targets, or its square
    batch,  # (3,) float64: valid rows, both means
    counter,
    rows,  # N
    units,  # C / WHOLE
    target_stride,  # of the rows, as the others; those of matrices / WHOLE
    stride,
    ignore: tl.int64,
    SQUARED: tl.constexpr,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    classes = units * WHOLE
    read = read_targets(
        target, row, target_stride, ignore, classes, TARGET, WHOLE, REAL, BLOCK, ONE
    )
    ys, valid = read[0], read[3]
    labels, label = label_logits(student, row, stride, ys, TARGET, WHOLE, REAL)
    peak, total = tl.full((), -INF, REAL), tl.full((), 0, REAL)
    for start in range(0, classes, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = (offs < classes) & (offs != ys[0]) & (offs != ys[1])
        x = tile(student, row, stride, offs, offs < classes, -INF, WHOLE, REAL)
        x = tl.where(inside, x, -INF)
        tile_seen = soften(peak, total, x, label, number(LOG2E, REAL))
        peak, total = tile_seen[0], tile_seen[1]
    p = join(total, labels, shift_of(peak, label), TARGET)[2]
    for k in tl.static_range(2):
        score = p[k] * p[k] if SQUARED else p[k]
        there = valid & (ys[k] >= 0)
        tl.store(values + row * 2 + k, tl.where(there, score, 0.0))
    if is_last(counter):
        counted = number(rows, tl.float64)
        if TARGET == 1:
            counted = count_valid(target, target_stride, rows, ignore).to(tl.float64)
        column = tl.arange(0, 2)
        mean = sum_rows(values, rows, 2, 2, BLOCK // 2) / tl.maximum(counted, 1.0)
        tl.store(batch + 1 + column, mean)
        tl.store(batch, counted)
        tl.store(counter, 0)


@jit
def smoothed_target(values, batch, row, present, targets, logs, p, unit, TARGET: tl.constexpr):
    """The sum of -w_t log S_t and its gradient: the factor of e_j, and the targets' entries.

    w_t = S_t (or its square) + V_t - batch mean, a constant; 0 where V_t = 0. values: of `scores`.
    """
    value = number(0, unit.dtype)
    total, weights = value, none()
    for k in tl.static_range(2):
        if k < TARGET:
            score = tl.load(values + row * 2 + k)
            w = score + targets[k] - tl.load(batch + 1 + k).to(unit.dtype)
            w = tl.where(present[k] & (targets[k] != 0), w, 0.0)
            value += gated(w, -logs[k])
            total += w
            weights = joined(weights, (w,))
    at = none()
    for k in tl.static_range(2):
        if k < TARGET:
            at = joined(at, (gated(total, p[k]) - weights[k],))
        else:
            at = joined(at, (number(0, unit.dtype),))
    return value, gated(total, unit), at


@jit
def mixed_cross_entropy(lse, unit, logs, p, off, far, targets, rest, dot, TARGET: tl.constexpr):
    """CE at T = 1: value, factor of e_j, entries of the targets. dot: of the rest, q_j u_j."""
    if TARGET == 1:
        return -logs[0], unit, (-off, number(0, unit.dtype))
    else:
        mass = rest + targets[0] + targets[1]
        value = gated(mass, lse) - (dot + gated(targets[0], far[0]) + gated(targets[1], far[1]))
        return value, mass * unit, (mass * p[0] - targets[0], mass * p[1] - targets[1])
