"""The rows of SLKD in Triton: a student and K SL-Ts under one teacher, all gradients at once.

A row's inputs are the student z, the SL-Ts s_k, the teacher t and, made of the SL-Ts, the fused
teacher f; of all four the shifts and sums are carried from tile to tile.
"""

from .batch import put_values, row_scale, total_rows
from .lang import jit, tl
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
    kl,
    none,
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
def fuse(fusion, slts):
    """sum_k fusion_k s_k; a weight of 0 leaves its SL-T out, whatever it holds."""
    f = gated(fusion[0], slts[0])
    for k in tl.static_range(1, len(slts)):
        f += gated(fusion[k], slts[k])
    return f


@jit
def read_tiles(inputs, row, offs, inside, y, fusion, SETTINGS: tl.constexpr):
    """A tile of the students as they are, then with the label at -inf; of t, f, probabilities."""
    students, teacher, strides, target, target_stride = inputs
    WHOLE: tl.constexpr = SETTINGS[0]
    REAL: tl.constexpr = SETTINGS[1]
    TARGET: tl.constexpr = SETTINGS[2]
    rest = offs != y
    raw, masked, slts = none(), none(), none()
    for k in tl.static_range(len(students)):
        x = tile(students[k], row, strides[k], offs, inside, -INF, WHOLE, REAL)
        raw = joined(raw, (x,))
        masked = joined(masked, (tl.where(rest, x, -INF),))
        if k > 0:
            slts = joined(slts, (x,))
    t = tile(teacher, row, strides[len(students)], offs, inside, -INF, WHOLE, REAL)
    q = t
    if TARGET == 2:
        q = tile(target, row, target_stride, offs, inside, 0.0, WHOLE, REAL)
        q = tl.where(rest, q, 0.0)
    f = tl.where(rest & inside, fuse(fusion, slts), -INF)
    return raw, masked, tl.where(rest, t, -INF), f, q


@jit
def collect(
    states,
    crossings,
    of_t,
    of_f,
    tiles,
    offs,
    inside,
    y,
    labels,
    step,
    AT_ONE: tl.constexpr,
    TARGET: tl.constexpr,
):
    """One more tile of the statistics.

    states: `see` of all students. crossings: of each the sum of e_t,j (u_t,j - u_j). of_t, of_f:
    maximum and sum of the teachers, f also its own crossing with z.
    """
    raw, masked, t, f, q = tiles
    of_students, label_t, label_f = labels
    t_top, t_total, t_before, t_now, t_carry, t_e = soften(of_t[0], of_t[1], t, label_t, step)
    f_top, f_total, f_before, f_now, f_carry, f_e = soften(of_f[0], of_f[1], f, label_f, step)
    new, crossed, fused = none(), none(), of_f[2]
    for k in tl.static_range(len(raw)):
        x, label = masked[k], of_students[k]
        state, before, now = see(
            states[k], x, raw[k], q, offs, inside, y, label, label, step, AT_ONE, TARGET
        )
        new = joined(new, (state,))
        pair = cross(crossings[k], of_t[1], t_carry, t, t_before, t_now, t_e, x, before, now, step)
        crossed = joined(crossed, (pair,))
        if k == 0:
            fused = cross(of_f[2], of_f[1], f_carry, f, f_before, f_now, f_e, x, before, now, step)
    return new, crossed, (t_top, t_total), (f_top, f_total, fused)


@jit
def put_gradients(
    gradients, row, units, tiles, offs, inside, y, shifts, factors, SETTINGS: tl.constexpr
):
    """factors of student k: a of e_j at T, c at T = 1, of e_t,j, of e_f,j, the label's entry.

    Where an SL-T is pulled, of_f is the factor of e_f,j (u_f,j - u_z,j - drift).
    """
    WHOLE: tl.constexpr = SETTINGS[0]
    TARGET: tl.constexpr = SETTINGS[2]
    AT_ONE: tl.constexpr = SETTINGS[3]
    PULLED: tl.constexpr = SETTINGS[4]
    _, masked, t, f, q = tiles
    nows, t_now, f_now, step = shifts
    of_students, drift, valid = factors
    t_e, f_e = tl.exp2((t - t_now) * step), tl.exp2((f - f_now) * step)
    for k in tl.static_range(len(masked)):
        a, c, of_t, of_f, of_q, at_label = of_students[k]
        x, now = masked[k], nows[k]
        if AT_ONE == 2:
            a += c
        g = a * tl.exp2((x - now) * step) - tl.where(of_t == 0, 0.0, of_t * t_e)
        if k == 0:
            g -= tl.where(of_f == 0, 0.0, of_f * f_e)
        elif PULLED:
            gap = LN2 * ((f - f_now) * step - (masked[0] - nows[0]) * step) - drift
            pull = tl.where(f_e > 0, f_e * gap, 0.0)
            g += tl.where(of_f == 0, 0.0, of_f * pull)
        if AT_ONE == 1:
            g += c * tl.exp2((x - now) * LOG2E)
        if TARGET == 2:
            g += gated(of_q, q)
        g = tl.where(valid, tl.where(offs == y, at_label, g), 0.0)
        put_tile(gradients[k], row, units, offs, inside, g, WHOLE)


@jit(do_not_specialize=["rows", "units", "target_stride", "upstream_stride", "ignore"])
def slkd_rows(
    students,  # the student and K SL-Ts, (N, C) each
    teacher,  # (N, C)
    gradients,  # 1 + K of (N, C), or None
    target,  # (N,) or (N, C)
    denominator,  # (), or None
    upstream,  # () or (N,), or None
    values,  # (N, 1 + terms)
    loss,
    terms,
    counter,
    scratch,  # the count of valid rows
    scalars,  # the op's numbers, see `rows.param`
    strides,  # of the students and the teacher
    rows,  # N
    units,  # C / WHOLE
    target_stride,  # of the rows, as the others; those of matrices / WHOLE
    upstream_stride,
    ignore: tl.int64,
    COEFFICIENTS: tl.constexpr,
    PULLED: tl.constexpr,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    TARGET: tl.constexpr,
    AT_ONE: tl.constexpr,
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
    COUNT: tl.constexpr = len(students)
    SETTINGS: tl.constexpr = (WHOLE, REAL, TARGET, AT_ONE, PULLED)
    row = tl.program_id(0).to(tl.int64)
    classes = units * WHOLE
    batch = (denominator, scratch, target, target_stride, rows, ignore)
    scale = row_scale(batch, REAL, MEAN)
    y, value, rest_mass, valid = read_label(
        target, row, target_stride, ignore, classes, TARGET, WHOLE, REAL, BLOCK, ONE
    )
    step = LOG2E / param(scalars, 0, REAL)
    zero, nothing = tl.full((), 0, REAL), tl.full((), -INF, REAL)
    fusion, of_students, states, crossings, slt_labels = none(), none(), none(), none(), none()
    for k in tl.static_range(COUNT):
        label = element(students[k], row, strides[k], y, WHOLE, REAL)
        of_students = joined(of_students, (label,))
        states = joined(states, (unseen(REAL),))
        crossings = joined(crossings, (zero,))
        if k > 0:
            fusion = joined(fusion, (param(scalars, 6 + k, REAL),))
            slt_labels = joined(slt_labels, (label,))
    label_t = element(teacher, row, strides[COUNT], y, WHOLE, REAL)
    label_f = fuse(fusion, slt_labels)
    labels = (of_students, label_t, label_f)
    of_t, of_f = (nothing, zero), (nothing, zero, zero)
    inputs = (students, teacher, strides, target, target_stride)
    offs = tl.arange(0, BLOCK)
    inside = offs < classes
    if ONE:
        tiles = read_tiles(inputs, row, offs, inside, y, fusion, SETTINGS)
        states, crossings, of_t, of_f = collect(
            states, crossings, of_t, of_f, tiles, offs, inside, y, labels, step, AT_ONE, TARGET
        )
    else:
        for start in range(0, classes, BLOCK):
            some = start + tl.arange(0, BLOCK)
            within = some < classes
            part = read_tiles(inputs, row, some, within, y, fusion, SETTINGS)
            states, crossings, of_t, of_f = collect(
                states, crossings, of_t, of_f, part, some, within, y, labels, step, AT_ONE, TARGET
            )

    t_now, f_now = shift_of(of_t[0], label_t), shift_of(of_f[0], label_f)
    t_label, f_label = (label_t - t_now) * step * LN2, (label_f - f_now) * step * LN2
    t, f = split(of_t[1], t_label), split(of_f[1], f_label)
    softmaxes, nows, softmaxes1, hits = none(), none(), none(), none()
    for k in tl.static_range(COUNT):
        now = shift_of(states[k][0], of_students[k])
        u = (of_students[k] - now) * step * LN2
        at = split(states[k][1], u)
        at1 = at
        if AT_ONE == 1:
            at1 = split(states[k][2], of_students[k] - now)
        ce = cross_entropy(at1, states[k], of_students[k], value, rest_mass, TARGET)
        pair = kl(u, at, t_label, t, LN2 * crossings[k])
        softmaxes = joined(softmaxes, ((u, at, pair),))
        softmaxes1 = joined(softmaxes1, ((at1, ce),))
        nows = joined(nows, (now,))
        ahead = states[k][3]
        hits = joined(hits, ((hit(ahead, of_students[k], 1), hit(ahead, of_students[k], 5)),))
    fused = kl(softmaxes[0][0], softmaxes[0][1], f_label, f, LN2 * of_f[2])
    own, of_rows, factors = COEFFICIENTS(
        scalars, fusion, softmaxes, softmaxes1, hits, t, (f_label, f, fused), PULLED, REAL
    )
    put_values(values, loss, row, joined((own,), of_rows), valid, REDUCTION, COLUMNS)

    if GRADIENT:
        weight = scale
        if upstream is not None:
            weight = scale * tl.load(upstream + row * upstream_stride).to(REAL)
        weighted = none()
        for k in tl.static_range(COUNT):
            a, c, b, of_fused, of_q, at_label = factors[k]
            weighted = joined(
                weighted,
                (
                    (
                        weight * a,
                        weight * c,
                        weight * b,
                        weight * of_fused,
                        weight * of_q,
                        weight * at_label,
                    ),
                ),
            )
        shifts = (nows, t_now, f_now, step)
        scaled = (weighted, fused[2], valid)
        if ONE:
            put_gradients(gradients, row, units, tiles, offs, inside, y, shifts, scaled, SETTINGS)
        else:
            for start in range(0, classes, BLOCK):
                some = start + tl.arange(0, BLOCK)
                within = some < classes
                part = read_tiles(inputs, row, some, within, y, fusion, SETTINGS)
                put_gradients(
                    gradients, row, units, part, some, within, y, shifts, scaled, SETTINGS
                )
    ENDING: tl.constexpr = (TARGET, REDUCTION, COLUMNS, WIDTH, COUNTS, LINES)
    total_rows(values, loss, terms, counter, batch, scale, ENDING)
