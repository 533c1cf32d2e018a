"""The rows of USKD in Triton, after `self_taught.scores`.

A class's rank is counted: every class against every other, C^2 comparisons of a row, which a block
holds. LONGEST is therefore the longest row.
"""

from .batch import put_values, row_scale, total_rows
from .lang import jit, tl
from .rows import (
    INF,
    LOG2E,
    ahead_of,
    gated,
    hit,
    joined,
    none,
    number,
    put_tile,
    shift_of,
    spread,
    tile,
)
from .self_taught import (
    join,
    label_logits,
    mixed_cross_entropy,
    read_targets,
    smoothed_target,
)

LONGEST = 4096
SMOOTH = tl.constexpr(0.1)  # label smoothing of the weak head's cross-entropy


@jit
def key_of(z, w, z_at, w_at, scales, PAPER: tl.constexpr):
    """What classes are ranked by; NaN comes before any number. _at: shift and log-sum-exp."""
    own = (z - z_at[0]) - z_at[1]
    if PAPER:
        own = tl.exp(own)
    key = tl.exp((w - w_at[0]) - w_at[1]) * scales[0] + own * scales[1]
    return tl.where(key == key, key, INF)


@jit
def rank_scale(p):
    """1 / (1 - the targets' scores)."""
    return 1 / (1 - (p[0] + p[1]) + 1e-6)


@jit
def ranks(
    inputs,
    row,
    key,
    offs,
    classes,
    z_at,
    w_at,
    scales,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    PAPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many classes come before each, by falling key, equal keys by rising class."""
    CHUNK: tl.constexpr = 4
    student, stride, weak, weak_stride = inputs
    ahead = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, classes, CHUNK):
        i = start + tl.arange(0, CHUNK)
        there = i < classes
        z = tile(student, row, stride, i, there, -INF, WHOLE, REAL)
        w = tile(weak, row, weak_stride, i, there, -INF, WHOLE, REAL)
        other = key_of(z, w, z_at, w_at, scales, PAPER)[:, None]
        first = (other > key[None, :]) | ((other == key[None, :]) & (i[:, None] < offs[None, :]))
        ahead += tl.sum((first & there[:, None]).to(tl.int32), 0)
    return ahead


@jit
def half(raw, rest, labels, label, TARGET: tl.constexpr):
    """Student or weak head at T = 1: masked logits, shift, e_j, its sum, and `join`."""
    x = tl.where(rest, raw, -INF)
    now = shift_of(tl.max(x, 0), label)
    e = tl.exp2((x - now) * LOG2E)
    total = tl.sum(e, 0)
    return x, now, e, total, join(total, labels, now, TARGET)


@jit
def dot_of(q, x, now):
    return tl.sum(tl.where(q != 0, q * (x - now), 0.0), 0)


@jit
def put(gradient, row, units, offs, inside, g, ys, at, valid, WHOLE: tl.constexpr):
    g = tl.where(offs == ys[0], at[0], g)
    g = tl.where(offs == ys[1], at[1], g)
    g = tl.where(valid, g, 0.0)
    put_tile(gradient, row, units, offs, inside, g, WHOLE)


@jit(
    do_not_specialize=[
        "rows",
        "units",
        "target_stride",
        "stride",
        "weak_stride",
        "upstream_stride",
        "ignore",
    ]
)
def uskd_rows(
    student,  # (N, C)
    weak,  # (N, C)
    gradients,  # both (N, C), or None
    target,  # (N,) or (N, C)
    denominator,  # (), or None
    upstream,  # () or (N,), or None
    scored,  # (N, 2), of `scores`
    scratch,  # (3,), of `scores`
    values,  # (N, 1 + terms)
    loss,
    terms,
    counter,
    scalars,  # the op's numbers, see `rows.param`
    rows,  # N
    units,  # C / WHOLE
    target_stride,  # of the rows, as the others; those of matrices / WHOLE
    stride,
    weak_stride,
    upstream_stride,
    ignore: tl.int64,
    COEFFICIENTS: tl.constexpr,
    PAPER: tl.constexpr,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    TARGET: tl.constexpr,
    MEAN: tl.constexpr,
    REDUCTION: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNTS: tl.constexpr,
    LINES: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    classes = units * WHOLE
    batch = (denominator, scratch, target, target_stride, rows, ignore)
    scale = row_scale(batch, REAL, MEAN)
    ys, targets, rest_mass, valid = read_targets(
        target, row, target_stride, ignore, classes, TARGET, WHOLE, REAL, BLOCK, True
    )
    labels, label = label_logits(student, row, stride, ys, TARGET, WHOLE, REAL)
    weak_labels, weak_label = label_logits(weak, row, weak_stride, ys, TARGET, WHOLE, REAL)
    offs = tl.arange(0, BLOCK)
    inside = offs < classes
    rest = inside & (offs != ys[0]) & (offs != ys[1])
    raw = tile(student, row, stride, offs, inside, -INF, WHOLE, REAL)
    weak_raw = tile(weak, row, weak_stride, offs, inside, -INF, WHOLE, REAL)
    z, now, e, total, at = half(raw, rest, labels, label, TARGET)
    w, w_now, w_e, _, w_at = half(weak_raw, rest, weak_labels, weak_label, TARGET)
    lse, logs, p, off, unit = at
    q = z
    dot, weak_dot = number(0, REAL), number(0, REAL)
    if TARGET == 2:
        q = tile(target, row, target_stride, offs, inside, 0.0, WHOLE, REAL)
        q = tl.where(rest, q, 0.0)
        dot, weak_dot = dot_of(q, z, now), dot_of(q, w, w_now)
    far = (labels[0] - now, labels[1] - now)
    weak_far = (weak_labels[0] - w_now, weak_labels[1] - w_now)

    own_p = p
    if not PAPER:
        own_p = (logs[0], tl.where(ys[1] < 0, 0.0, logs[1]))
    scales = (rank_scale(w_at[2]), rank_scale(own_p))
    z_at, of_w = (now, lse), (w_now, w_at[0])
    key = key_of(raw, weak_raw, z_at, of_w, scales, PAPER)
    ahead = ranks(
        (student, stride, weak, weak_stride),
        row,
        key,
        offs,
        classes,
        z_at,
        of_w,
        scales,
        WHOLE,
        REAL,
        PAPER,
        BLOCK,
    )
    share = tl.where(rest, 1 / (ahead + 1).to(REAL), 0.0)
    share_unit = spread(tl.sum(share, 0))
    ranked = dot_of(share, z, now) * share_unit
    others = tl.where(total == 0, 0.0, tl.log(total) - ranked)

    present = (ys[0] >= 0, ys[1] >= 0)
    smoothed = smoothed_target(scored, scratch, row, present, targets, logs, p, unit, TARGET)
    crossed = mixed_cross_entropy(lse, unit, logs, p, off, far, targets, rest_mass, dot, TARGET)
    of_weak = mixed_cross_entropy(
        w_at[0], w_at[4], w_at[1], w_at[2], w_at[3], weak_far, targets, rest_mass, weak_dot, TARGET
    )
    # 0.9 y + 0.1 / C is 0.9 of the cross-entropy and 0.1 of that with a uniform target.
    plain = tl.sum(tl.where(rest, w - w_now, 0.0), 0) + weak_far[0]
    if TARGET == 2:
        plain += tl.where(ys[1] < 0, 0.0, weak_far[1])
    even = number(1, REAL) / classes
    weak_ce = (1 - SMOOTH) * of_weak[0] + SMOOTH * (w_at[0] - plain * even)

    alpha, beta, mu, ce_weight = COEFFICIENTS(scalars, REAL)
    own = gated(alpha, smoothed[0]) + gated(beta, others) + gated(mu, weak_ce)
    own += gated(ce_weight, crossed[0])
    count = ahead_of(raw, offs, inside, ys[0], labels[0])
    top1, top5 = hit(count, labels[0], 1), hit(count, labels[0], 5)
    row_values = (own, smoothed[0], others, weak_ce, crossed[0], top1, top5)
    put_values(values, loss, row, row_values, valid, REDUCTION, COLUMNS)

    if GRADIENT:
        by = scale
        if upstream is not None:
            by = scale * tl.load(upstream + row * upstream_stride).to(REAL)
        c = gated(alpha, smoothed[1]) + gated(ce_weight, crossed[1]) + gated(beta, spread(total))
        g = (by * c) * e - (by * beta * share_unit) * share
        weak_c = mu * ((1 - SMOOTH) * of_weak[1] + SMOOTH * w_at[4])
        weak_even = mu * SMOOTH * even
        weak_g = (by * weak_c) * w_e - by * weak_even
        if TARGET == 2:
            g -= (by * ce_weight) * q
            weak_g -= (by * mu * (1 - SMOOTH)) * q
        at_z, at_w = none(), none()
        for k in tl.static_range(2):
            of_z = gated(alpha, smoothed[2][k]) + gated(ce_weight, crossed[2][k])
            of_weak_k = mu * ((1 - SMOOTH) * of_weak[2][k] + SMOOTH * w_at[2][k]) - weak_even
            at_z, at_w = joined(at_z, (by * of_z,)), joined(at_w, (by * of_weak_k,))
        put(gradients[0], row, units, offs, inside, g, ys, at_z, valid, WHOLE)
        put(gradients[1], row, units, offs, inside, weak_g, ys, at_w, valid, WHOLE)
    ENDING: tl.constexpr = (TARGET, REDUCTION, COLUMNS, WIDTH, COUNTS, LINES)
    total_rows(values, loss, terms, counter, batch, scale, ENDING)
