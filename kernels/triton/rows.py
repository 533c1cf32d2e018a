"""The row pass in Triton: what one read of a row gives, for every loss. N rows, C classes.

A row of logits x is seen as two parts, the label y and the rest, each with its own maximum, so that
log(1 - p_y) is a difference of log-sum-exps. Exponents are base 2 and relative to a shift, about
the rest's maximum: u_j = (x_j - shift) * step, step = log2(e) / T. All numbers are REAL (float32,
or float64 where an input is). Tiles of a row may come one after the other: what has been summed is
then carried to the new shift. A tile holds -inf at the labels and behind the row.

Kernels are compiled without contraction of products and sums: student == teacher must give
exactly 0.
"""

from .lang import jit, tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@jit
def number(x, REAL: tl.constexpr):
    """A Python or float32 number as REAL."""
    return x + tl.full((), 0, REAL)


@jit
def param(params, i: tl.constexpr, REAL: tl.constexpr):
    """Number i of the op; for float64 each comes as two of float32, high parts before low ones."""
    x = number(params[i], REAL)
    if REAL == tl.float64:
        x += number(params[i + len(params) // 2], REAL)
    return x


@jit
def none():
    """An empty tuple, to be `joined` with others of any length."""
    return ()


@jit
def joined(some, more):
    return some + more


@jit
def gated(weight, x):
    """weight * x, where a weight of 0 gives exactly 0 whatever x is."""
    return tl.where(weight == 0, 0.0, weight * x)


@jit
def log1p(x):
    """For x >= 0. The rounding of 1 + x is made up for."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / (y - 1)))


@jit
def tile(x, row, stride, offs, inside, pad, WHOLE: tl.constexpr, REAL: tl.constexpr):
    """Of a matrix whose rows are stride * WHOLE apart: the product is known to be a multiple."""
    return tl.load(x + row * stride * WHOLE + offs, mask=inside, other=pad).to(REAL)


@jit
def element(x, row, stride, j, WHOLE: tl.constexpr, REAL: tl.constexpr):
    return tl.load(x + row * stride * WHOLE + j).to(REAL)


@jit
def put_tile(x, row, units, offs, inside, g, WHOLE: tl.constexpr):
    """Into a contiguous matrix of units * WHOLE columns."""
    if x.dtype.element_ty == tl.bfloat16:
        g = g.to(tl.float32)  # the interpreter makes 0 of a float64
    tl.store(x + row * units * WHOLE + offs, g.to(x.dtype.element_ty), mask=inside)


@jit
def reference_of(label):
    """A number of about the logits' size that is known before the row is read."""
    return tl.where((label - label) == 0, label, 0.0)


@jit
def shift_of(peak, label):
    """Where all of the rest is -inf the label stands in, so that the row keeps its softmax."""
    return tl.where(peak == -INF, reference_of(label), peak)


@jit
def soften(peak, total, x, label, step):
    """One more tile of a softmax.

    Returns the rest's maximum, the sum of e_j, the shifts before and now, what carries a sum from
    one to the other, and e_j = 2^u_j of this tile.
    """
    top = tl.maximum(peak, tl.max(x, 0))
    before, now = shift_of(peak, label), shift_of(top, label)
    # Before the first finite number there is no sum, and -inf - -inf would be NaN.
    carry = tl.where(peak == -INF, 0.0, tl.exp2((before - now) * step))
    e = tl.exp2((x - now) * step)
    return top, total * carry + tl.sum(e, 0), before, now, carry, e


@jit
def cross(crossed, total, carry, t, t_before, t_now, e, z, z_before, z_now, step):
    """One more tile of the sum of e_t,j (u_t,j - u_z,j). total: the teacher's sum before it."""
    moved = ((t_before - t_now) - (z_before - z_now)) * step
    gap = (t - t_now) * step - (z - z_now) * step
    return carry * (crossed + moved * total) + tl.sum(tl.where(e > 0, e * gap, 0.0), 0)


@jit
def ahead_of(raw, offs, inside, y, label):
    """How many classes come before the label: ties to the lower index, NaN before any number."""
    ahead = (raw < label) == 0
    ahead = ahead & ((offs < y) | (raw != label)) & (offs != y) & inside
    return tl.sum(ahead.to(tl.int32), 0)


@jit
def see(
    state,
    x,
    raw,
    q,
    offs,
    inside,
    y,
    label,
    ranked,
    step,
    AT_ONE: tl.constexpr,
    TARGET: tl.constexpr,
):
    """One more tile of a student. label: the largest label's logit; ranked: that of y.

    State: the rest's maximum; the sums of e_j at T and at T = 1 (AT_ONE 1; 2: T is 1); how many
    classes are ahead of the label; the sum of q_j (x_j - reference), q the class probabilities.
    Returns it with the shifts before and now.
    """
    peak, total, total1, ahead, dot = state
    top, total, before, now, _, _ = soften(peak, total, x, label, step)
    if AT_ONE == 1:
        carry = tl.where(peak == -INF, 0.0, tl.exp2((before - now) * LOG2E))
        total1 = total1 * carry + tl.sum(tl.exp2((x - now) * LOG2E), 0)
    if TARGET > 0:
        ahead += ahead_of(raw, offs, inside, y, ranked)
    if TARGET == 2:
        dot += tl.sum(tl.where(q != 0, q * (x - reference_of(label)), 0.0), 0)
    return (top, total, total1, ahead, dot), before, now


@jit
def unseen(REAL: tl.constexpr):
    """The state of `see` before the first tile."""
    zero = tl.full((), 0, REAL)
    return tl.full((), -INF, REAL), zero, zero, tl.full((), 0, tl.int32), zero


@jit
def split(total, label):
    """A softmax, from the sum over the rest and u_y (natural; -inf without a label).

    Returns the log-sum-exp, p_y, 1 - p_y, log p_y, and the factor of e_j in p_j.
    """
    high = tl.maximum(label, 0.0)
    unit = tl.exp(-high)
    rest, own = total * unit, tl.exp(label - high)  # a label at +inf gives NaN
    whole = rest + own
    log_whole = tl.where(label > 0, log1p(rest), tl.log(whole))
    return high + log_whole, own / whole, rest / whole, (label - high) - log_whole, unit / whole


@jit
def kl(z_label, z, t_label, t, crossed):
    """KL(q || p) of teacher t and student z at one temperature, from their `split`.

    crossed: the sum over the rest of e_t,j (u_t,j - u_z,j), natural. Returns the value, p_y - q_y,
    and the sum over all classes of q_j (u_t,j - u_z,j).
    """
    drift = gated(t[4], crossed) + gated(t[1], t_label - z_label)
    return drift + (z[0] - t[0]), z[1] - t[1], drift


@jit
def spread(total):
    """1 / total, 0 where there is nothing."""
    return tl.where(total == 0, 0.0, 1 / total)


@jit
def kl_rest(z_total, t_total, crossed):
    """The same over the rest alone: its value, and 1 / sum of either; without teacher mass 0."""
    a, b = spread(z_total), spread(t_total)
    value = crossed * b + (tl.log(z_total) - tl.log(t_total))
    # No student mass where the teacher has some: infinite, though the sum would be inf - inf.
    value = tl.where(z_total == 0, INF, value)
    return tl.where(t_total == 0, 0.0, value), tl.where(t_total == 0, 0.0, a), b


@jit
def cross_entropy(at, state, label, value, rest_mass, TARGET: tl.constexpr):
    """CE at T = 1, its derivative at the label, and the mass of the target.

    value: the label's probability, rest_mass: that of all other classes.
    """
    if TARGET == 1:
        return -at[3], -at[2], number(1.0, label.dtype)
    else:
        now = shift_of(state[0], label)
        dot = state[4] + gated(rest_mass, reference_of(label) - now) + gated(value, label - now)
        mass = rest_mass + value
        return gated(mass, at[0]) - dot, mass * at[1] - value, mass


@jit
def hit(ahead, label, k: tl.constexpr):
    """Whether the label is among the first k; a label at NaN never is."""
    return ((ahead < k) & (label == label)).to(label.dtype)
