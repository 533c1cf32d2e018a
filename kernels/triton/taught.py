"""The rows of the losses that have one student under teachers: KD, DKD, NKD and WTTM, in Triton.

A loss is its COEFFICIENTS: from the statistics of a row to its value, its own terms, and the
factors of the exponentials in the gradient (kd.py, dkd.py, nkd.py, wttm.py); and its FORM: whether
the teacher's exponents are part of the sum over both (Op.entropy), how its sums at T = 1 are made
(0: not read, 1: apart, 2: T is 1), and whether the student's temperature is 1.

A teacher is a matrix of logits, or of a row's k largest (listed.py): then LISTED holds k.
"""

from .batch import put_values, row_scale, total_rows
from .lang import jit, tl
from .listed import listed_label, listed_tile, shift_and_fill
from .rows import (
    INF,
    LN2,
    LOG2E,
    cross,
    cross_entropy,
    element,
    gated,
    hit,
    joined,
    none,
    number,
    param,
    put_tile,
    see,
    shift_of,
    soften,
    split,
    tile,
    unseen,
)
from .target import read_label


@jit
def read_tiles(inputs, row, offs, inside, y, fills, SETTINGS: tl.constexpr):
    """A tile of every input: the student's as it is; labels at -inf; teachers'; probabilities."""
    student, teachers, strides, indices, target, target_stride = inputs
    WHOLE: tl.constexpr = SETTINGS[0]
    REAL: tl.constexpr = SETTINGS[1]
    TARGET: tl.constexpr = SETTINGS[2]
    LISTED: tl.constexpr = SETTINGS[3]
    raw = tile(student, row, strides[0], offs, inside, -INF, WHOLE, REAL)
    rest = offs != y
    taught, found = none(), none()
    for k in tl.static_range(len(teachers)):
        if LISTED[k] > 0:
            t, listed = listed_tile(
                teachers[k],
                indices[k],
                row,
                strides[k + 1],
                strides[k + 1 + len(teachers)],
                fills[k],
                offs,
                inside,
                LISTED[k],
            )
        else:
            t = tile(teachers[k], row, strides[k + 1], offs, inside, -INF, WHOLE, REAL)
            listed = tl.full((), 0, tl.int32)
        taught = joined(taught, (tl.where(rest, t, -INF),))
        found = joined(found, (listed,))
    q = raw
    if TARGET == 2:
        q = tile(target, row, target_stride, offs, inside, 0.0, WHOLE, REAL)
        q = tl.where(rest, q, 0.0)
    return raw, tl.where(rest, raw, -INF), taught, q, found


@jit
def collect(
    state,
    states,
    tiles,
    offs,
    inside,
    y,
    label,
    labels,
    steps,
    AT_ONE: tl.constexpr,
    TARGET: tl.constexpr,
    FORM: tl.constexpr,
):
    """One more tile of the statistics. steps: of the teachers and of the student.

    A teacher's state: the rest's maximum; the sum of e_j; the sum of e_j (u_t,j - u_z,j), or
    without entropy of e_j u_z,j; the sum of e_j at T = 1 where that is apart; how many classes are
    listed.
    """
    raw, z, taught, q, found = tiles
    step, own = steps
    state, z_before, z_now = see(
        state, z, raw, q, offs, inside, y, label, label, own, AT_ONE, TARGET
    )
    new = none()
    for k in tl.static_range(len(taught)):
        peak, before, crossed, total1, listed = states[k]
        t = taught[k]
        top, total, t_before, t_now, carry, e = soften(peak, before, t, labels[k], step)
        if FORM[0] and FORM[2]:
            moved = (t_before - t_now) * step - (z_before - z_now) * own
            gap = tl.where(e > 0, e * ((t - t_now) * step - (z - z_now) * own), 0.0)
            crossed = carry * (crossed + moved * before) + tl.sum(gap, 0)
        elif FORM[0]:
            crossed = cross(crossed, before, carry, t, t_before, t_now, e, z, z_before, z_now, step)
        else:
            of_z = tl.where(e > 0, e * ((z - z_now) * own), 0.0)
            crossed = carry * (crossed + (z_before - z_now) * own * before) + tl.sum(of_z, 0)
        if FORM[1] == 1:
            carry1 = tl.where(peak == -INF, 0.0, tl.exp2((t_before - t_now) * LOG2E))
            total1 = total1 * carry1 + tl.sum(tl.exp2((t - t_now) * LOG2E), 0)
        new = joined(new, ((top, total, crossed, total1, listed + found[k]),))
    return state, new


@jit
def put_gradient(
    gradient, row, units, tiles, offs, inside, y, shifts, factors, SETTINGS: tl.constexpr
):
    """factors: a of e_j at T, c at T = 1, b_k of the teachers', of q_j; the label's entry."""
    WHOLE: tl.constexpr = SETTINGS[0]
    TARGET: tl.constexpr = SETTINGS[2]
    AT_ONE: tl.constexpr = SETTINGS[4]
    _, z, taught, q, _ = tiles
    now, taught_now, step, own = shifts
    a, c, bs, of_q, at_label, valid = factors
    if AT_ONE == 2:
        a += c
    g = a * tl.exp2((z - now) * own)
    for k in tl.static_range(len(taught)):
        e = tl.exp2((taught[k] - taught_now[k]) * step)
        g -= tl.where(bs[k] == 0, 0.0, bs[k] * e)  # whatever a row without weight holds
    if AT_ONE == 1:
        g += c * tl.exp2((z - now) * LOG2E)
    if TARGET == 2:
        g += gated(of_q, q)
    g = tl.where(valid, tl.where(offs == y, at_label, g), 0.0)
    put_tile(gradient, row, units, offs, inside, g, WHOLE)


@jit(do_not_specialize=["rows", "units", "target_stride", "upstream_stride", "ignore"])
def taught_rows(
    student,  # (N, C)
    teachers,  # K of (N, C), or (N, LISTED[k])
    gradient,  # (N, C)
    target,  # (N,) or (N, C), or None
    denominator,  # (), or None
    upstream,  # () or (N,), or None
    indices,  # K of (N, LISTED[k]), or None
    masses,  # K of (N,), or None
    values,  # (N, 1 + terms)
    loss,
    terms,
    counter,
    scratch,  # the count of valid rows
    scalars,  # the op's numbers, see `rows.param`
    strides,  # of the student, the teachers, the indices and the masses
    rows,  # N
    units,  # C / WHOLE
    target_stride,  # of the rows, as the others; those of matrices / WHOLE
    upstream_stride,
    ignore: tl.int64,
    COEFFICIENTS: tl.constexpr,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    TARGET: tl.constexpr,
    LISTED: tl.constexpr,
    HOLDS: tl.constexpr,
    AT_ONE: tl.constexpr,
    FORM: tl.constexpr,
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
    K: tl.constexpr = len(teachers)
    SETTINGS: tl.constexpr = (WHOLE, REAL, TARGET, LISTED, AT_ONE)
    row = tl.program_id(0).to(tl.int64)
    classes = units * WHOLE
    batch = (denominator, scratch, target, target_stride, rows, ignore)
    scale = row_scale(batch, REAL, MEAN)
    y, value, rest_mass, valid = read_label(
        target, row, target_stride, ignore, classes, TARGET, WHOLE, REAL, BLOCK, ONE
    )
    temperature = param(scalars, 0, REAL)
    step = LOG2E / temperature
    own = step
    if FORM[2]:
        own = number(LOG2E, REAL)
    label = tl.full((), -INF, REAL)
    if TARGET > 0:
        label = element(student, row, strides[0], y, WHOLE, REAL)
    labels, fills, states = none(), none(), none()
    for k in tl.static_range(K):
        of_label, fill = tl.full((), -INF, REAL), (tl.full((), 0, REAL), tl.full((), 0, REAL))
        if LISTED[k] > 0:
            fill = shift_and_fill(
                teachers[k],
                masses[k],
                row,
                strides[k + 1],
                strides[k + 1 + 2 * K],
                valid,
                classes,
                temperature,
                LISTED[k],
                HOLDS[k],
                REAL,
            )
        if TARGET > 0:
            if LISTED[k] > 0:
                of_label = listed_label(
                    teachers[k],
                    indices[k],
                    row,
                    strides[k + 1],
                    strides[k + 1 + K],
                    fill,
                    y,
                    LISTED[k],
                    HOLDS[k],
                    REAL,
                )
            else:
                of_label = element(teachers[k], row, strides[k + 1], y, WHOLE, REAL)
        zero = tl.full((), 0, REAL)
        labels = joined(labels, (of_label,))
        fills = joined(fills, (fill,))
        nothing = (tl.full((), -INF, REAL), zero, zero, zero, tl.full((), 0, tl.int32))
        states = joined(states, (nothing,))

    state, steps = unseen(REAL), (step, own)
    inputs = (student, teachers, strides, indices, target, target_stride)
    offs = tl.arange(0, BLOCK)
    inside = offs < classes
    if ONE:
        tiles = read_tiles(inputs, row, offs, inside, y, fills, SETTINGS)
        state, states = collect(
            state, states, tiles, offs, inside, y, label, labels, steps, AT_ONE, TARGET, FORM
        )
    else:
        for start in range(0, classes, BLOCK):
            some = start + tl.arange(0, BLOCK)
            within = some < classes
            part = read_tiles(inputs, row, some, within, y, fills, SETTINGS)
            state, states = collect(
                state,
                states,
                part,
                some,
                within,
                y,
                label,
                labels,
                steps,
                AT_ONE,
                TARGET,
                FORM,
            )

    now = shift_of(state[0], label)
    z_label = (label - now) * own * LN2
    z = split(state[1], z_label)
    z1 = z
    if AT_ONE == 1:
        z1 = split(state[2], label - now)
    taught, taught_now = none(), none()
    for k in tl.static_range(K):
        peak, total, crossed, total1, _ = states[k]
        t_now = shift_of(peak, labels[k])
        t_label = (labels[k] - t_now) * step * LN2
        t = split(total, t_label)
        t1 = t
        if FORM[1] == 1:
            t1 = split(total1, labels[k] - t_now)
        taught = joined(taught, ((total, t_label, t, t1, LN2 * crossed),))
        taught_now = joined(taught_now, (t_now,))
    of_row, own_terms, a, c, bs, at_label, ce_weight = COEFFICIENTS(
        scalars, (state[1], z_label, z, z1), taught, REAL
    )

    ce, top1, top5 = number(0, REAL), number(0, REAL), number(0, REAL)
    of_q = number(0, REAL)
    if TARGET > 0:
        ce, of_label, mass = cross_entropy(z1, state, label, value, rest_mass, TARGET)
        of_row += gated(ce_weight, ce)
        c += gated(ce_weight, mass * z1[4])
        at_label += gated(ce_weight, of_label)
        of_q = -ce_weight
        top1, top5 = hit(state[3], label, 1), hit(state[3], label, 5)
    row_values = joined(joined((of_row,), own_terms), (ce, top1, top5))
    put_values(values, loss, row, row_values, valid, REDUCTION, COLUMNS)

    if GRADIENT:
        weight = scale
        if upstream is not None:
            weight = scale * tl.load(upstream + row * upstream_stride).to(REAL)
        scaled = none()
        for k in tl.static_range(K):
            scaled = joined(scaled, (weight * bs[k],))
        factors = (weight * a, weight * c, scaled, weight * of_q, weight * at_label, valid)
        shifts = (now, taught_now, step, own)
        if ONE:
            put_gradient(gradient, row, units, tiles, offs, inside, y, shifts, factors, SETTINGS)
        else:
            for start in range(0, classes, BLOCK):
                some = start + tl.arange(0, BLOCK)
                within = some < classes
                part = read_tiles(inputs, row, some, within, y, fills, SETTINGS)
                put_gradient(gradient, row, units, part, some, within, y, shifts, factors, SETTINGS)
    for k in tl.static_range(K):  # here few numbers are alive, none of which a call makes spill
        if LISTED[k] > 0:
            whole = (states[k][4] == LISTED[k]) | (valid == 0)
            tl.device_assert(whole, "kdfuse: a class out of range or listed twice")
    ENDING: tl.constexpr = (TARGET, REDUCTION, COLUMNS, WIDTH, COUNTS, LINES)
    total_rows(values, loss, terms, counter, batch, scale, ENDING)
