"""Teachers of which only the k largest logits of a row are kept, in Triton.

Such a teacher is the row whose listed classes have the given logits, and every other class one
logit, the fill: -inf, or what gives these classes together the mass that was left out, at the
loss's temperature. LISTED: k; HOLDS: the power of 2 that holds it. No (N, C) row is ever written.
"""

from .lang import jit, tl
from .rows import INF, number, shift_of


@jit
def shift_and_fill(
    values,
    mass,
    row,
    stride,
    mass_stride,
    valid,
    classes,
    temperature,
    LISTED: tl.constexpr,
    HOLDS: tl.constexpr,
    REAL: tl.constexpr,
):
    """The largest logit, and that of the classes that are not listed less it.

    A softmax sees no shift, but a fill far from 0 would be rounded at the size of the logits.
    """
    i = tl.arange(0, HOLDS)
    x = tl.load(values + row * stride + i, mask=i < LISTED, other=-INF).to(REAL)
    peak = shift_of(tl.max(x, 0), tl.full((), 0, REAL))
    if mass is None:
        return peak, tl.full((), -INF, REAL)
    else:
        total = tl.sum(tl.exp((x - peak) / temperature), 0)
        left = tl.load(mass + row * mass_stride).to(REAL)
        fine = ~((left < 0) | (left >= 1))  # NaN reaches the loss, as in logits
        tl.device_assert(fine | (valid == 0), "kdfuse: a mass outside [0, 1)")
        others = number(tl.maximum(classes - LISTED, 1), REAL)
        odds = tl.log(left) - tl.log(1 - left)
        fill = temperature * (odds + tl.log(total) - tl.log(others))
        return peak, tl.where(left == 0, -INF, fill)


@jit
def listed_tile(
    values, indices, row, stride, index_stride, fills, offs, inside, LISTED: tl.constexpr
):
    """A tile of the whole row, and how many of its classes are listed."""
    peak, fill = fills
    x = tl.where(inside, fill, -INF)
    listed = offs < 0
    for i in range(LISTED):
        there = tl.load(indices + row * index_stride + i)
        there = tl.maximum(tl.minimum(there, 2147483647), -1).to(tl.int32)
        here = offs == there
        x = tl.where(here, tl.load(values + row * stride + i).to(x.dtype) - peak, x)
        listed = listed | here
    return x, tl.sum((listed & inside).to(tl.int32), 0)


@jit
def listed_label(
    values,
    indices,
    row,
    stride,
    index_stride,
    fills,
    y,
    LISTED: tl.constexpr,
    HOLDS: tl.constexpr,
    REAL: tl.constexpr,
):
    peak, fill = fills
    i = tl.arange(0, HOLDS)
    hits = tl.load(indices + row * index_stride + i, mask=i < LISTED, other=-1) == y
    hits = hits & (i < LISTED)
    x = tl.load(values + row * stride + i, mask=hits, other=0.0).to(REAL)
    return tl.where(tl.max(hits.to(tl.int32), 0) > 0, tl.sum(x, 0) - peak, fill)
