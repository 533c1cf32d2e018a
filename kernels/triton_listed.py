"""Teachers of which only the k largest logits of a row are kept, in Triton.

Such a teacher is the row whose listed classes have the given logits, and every other class one
logit, the fill: -inf, or what gives these classes together the mass that was left out, at the
loss's temperature. LISTED: k; HOLDS: the power of 2 that holds it. No (N, C) row is ever written.
"""

from .rows import INF, number, shift_of
from .triton_lang import jit, tl


@jit
def fill_of(
    values,
    mass,
    row,
    stride,
    mass_stride,
    classes,
    temperature,
    LISTED: tl.constexpr,
    HOLDS: tl.constexpr,
    REAL: tl.constexpr,
):
    """The logit of the classes that are not listed. HOLDS: the power of 2 that holds LISTED."""
    if mass is None:
        return tl.full((), -INF, REAL)
    else:
        i = tl.arange(0, HOLDS)
        x = tl.load(values + row * stride + i, mask=i < LISTED, other=-INF).to(REAL)
        peak = shift_of(tl.max(x, 0), tl.full((), 0, REAL))
        total = tl.sum(tl.exp((x - peak) / temperature), 0)
        left = tl.load(mass + row * mass_stride).to(REAL)
        others = number(tl.maximum(classes - LISTED, 1), REAL)
        odds = tl.log(left) - tl.log(1 - left)
        fill = peak + temperature * (odds + tl.log(total) - tl.log(others))
        return tl.where(left == 0, -INF, fill)


@jit
def listed_tile(
    values, indices, row, stride, index_stride, fill, offs, inside, LISTED: tl.constexpr
):
    x = tl.where(inside, fill, -INF)
    for i in range(LISTED):
        there = tl.load(indices + row * index_stride + i)
        x = tl.where(offs == there, tl.load(values + row * stride + i).to(x.dtype), x)
    return x


@jit
def listed_label(
    values,
    indices,
    row,
    stride,
    index_stride,
    fill,
    y,
    LISTED: tl.constexpr,
    HOLDS: tl.constexpr,
    REAL: tl.constexpr,
):
    i = tl.arange(0, HOLDS)
    hits = (tl.load(indices + row * index_stride + i, mask=i < LISTED, other=-1) == y) & (
        i < LISTED
    )
    x = tl.load(values + row * stride + i, mask=hits, other=0.0).to(REAL)
    return tl.where(tl.max(hits.to(tl.int32), 0) > 0, tl.sum(x, 0), fill)
