"""The rows of tf-NKD in Triton, after `self_taught.scores`."""

from .batch import put_values, row_scale, total_rows
from .lang import jit, tl
from .rows import (
    INF,
    LOG2E,
    gated,
    hit,
    number,
    put_tile,
    reference_of,
    see,
    shift_of,
    tile,
    unseen,
)
from .self_taught import (
    join,
    label_logits,
    mixed_cross_entropy,
    read_targets,
    smoothed_target,
)


@jit
def read_tiles(inputs, row, offs, inside, ys, SETTINGS: tl.constexpr):
    """A tile of the logits as they are, of them with both targets at -inf, of probabilities."""
    student, stride, target, target_stride = inputs
    WHOLE: tl.constexpr = SETTINGS[0]
    REAL: tl.constexpr = SETTINGS[1]
    TARGET: tl.constexpr = SETTINGS[2]
    raw = tile(student, row, stride, offs, inside, -INF, WHOLE, REAL)
    rest = (offs != ys[0]) & (offs != ys[1])
    q = raw
    if TARGET == 2:
        q = tile(target, row, target_stride, offs, inside, 0.0, WHOLE, REAL)
        q = tl.where(rest, q, 0.0)
    return raw, tl.where(rest, raw, -INF), q


@jit
def put_gradient(
    gradient, row, units, tiles, offs, inside, ys, now, factors, SETTINGS: tl.constexpr
):
    WHOLE: tl.constexpr = SETTINGS[0]
    TARGET: tl.constexpr = SETTINGS[2]
    c, of_q, at, valid = factors
    _, z, q = tiles
    g = c * tl.exp2((z - now) * LOG2E)
    if TARGET == 2:
        g += gated(of_q, q)
    g = tl.where(offs == ys[0], at[0], g)
    g = tl.where(offs == ys[1], at[1], g)
    g = tl.where(valid, g, 0.0)
    put_tile(gradient, row, units, offs, inside, g, WHOLE)


@jit(do_not_specialize=["rows", "units", "target_stride", "stride", "upstream_stride", "ignore"])
def tf_nkd_rows(
    student,  # (N, C)
    gradient,  # (N, C)
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
    upstream_stride,
    ignore: tl.int64,
    COEFFICIENTS: tl.constexpr,
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
    ONE: tl.constexpr,
):
    SETTINGS: tl.constexpr = (WHOLE, REAL, TARGET)
    row = tl.program_id(0).to(tl.int64)
    classes = units * WHOLE
    batch = (denominator, scratch, target, target_stride, rows, ignore)
    scale = row_scale(batch, REAL, MEAN)
    ys, targets, rest, valid = read_targets(
        target, row, target_stride, ignore, classes, TARGET, WHOLE, REAL, BLOCK, ONE
    )
    labels, label = label_logits(student, row, stride, ys, TARGET, WHOLE, REAL)
    state = unseen(REAL)
    inputs = (student, stride, target, target_stride)
    step = number(LOG2E, REAL)
    offs = tl.arange(0, BLOCK)
    inside = offs < classes
    if ONE:
        tiles = read_tiles(inputs, row, offs, inside, ys, SETTINGS)
        raw, z, q = tiles
        seen = see(state, z, raw, q, offs, inside, ys[0], label, labels[0], step, 2, TARGET)
        state = seen[0]
    else:
        for start in range(0, classes, BLOCK):
            some = start + tl.arange(0, BLOCK)
            within = some < classes
            raw, z, q = read_tiles(inputs, row, some, within, ys, SETTINGS)
            seen = see(state, z, raw, q, some, within, ys[0], label, labels[0], step, 2, TARGET)
            state = seen[0]
    now = shift_of(state[0], label)
    lse, logs, p, off, unit = join(state[1], labels, now, TARGET)
    present = (ys[0] >= 0, ys[1] >= 0)
    smoothed = smoothed_target(scored, scratch, row, present, targets, logs, p, unit, TARGET)
    dot = state[4] + gated(rest, reference_of(label) - now)
    far = (labels[0] - now, labels[1] - now)
    crossed = mixed_cross_entropy(lse, unit, logs, p, off, far, targets, rest, dot, TARGET)
    weight, ce_weight = COEFFICIENTS(scalars, REAL)
    own = gated(weight, smoothed[0]) + gated(ce_weight, crossed[0])
    top1, top5 = hit(state[3], labels[0], 1), hit(state[3], labels[0], 5)
    row_values = (own, smoothed[0], crossed[0], top1, top5)
    put_values(values, loss, row, row_values, valid, REDUCTION, COLUMNS)

    if GRADIENT:
        by = scale
        if upstream is not None:
            by = scale * tl.load(upstream + row * upstream_stride).to(REAL)
        c = by * (gated(weight, smoothed[1]) + gated(ce_weight, crossed[1]))
        first = by * (gated(weight, smoothed[2][0]) + gated(ce_weight, crossed[2][0]))
        second = by * (gated(weight, smoothed[2][1]) + gated(ce_weight, crossed[2][1]))
        factors = (c, -by * ce_weight, (first, second), valid)
        if ONE:
            put_gradient(gradient, row, units, tiles, offs, inside, ys, now, factors, SETTINGS)
        else:
            for start in range(0, classes, BLOCK):
                some = start + tl.arange(0, BLOCK)
                within = some < classes
                part = read_tiles(inputs, row, some, within, ys, SETTINGS)
                put_gradient(gradient, row, units, part, some, within, ys, now, factors, SETTINGS)
    ENDING: tl.constexpr = (TARGET, REDUCTION, COLUMNS, WIDTH, COUNTS, LINES)
    total_rows(values, loss, terms, counter, batch, scale, ENDING)
