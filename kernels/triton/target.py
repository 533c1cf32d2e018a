"""The target of a row in Triton: its label, or the largest of its class probabilities."""

from .lang import jit, tl
from .rows import INF, tile


@jit
def largest(q, offs, inside):
    """The first of the largest probabilities and its place; -1 where there is none above -inf."""
    kept = tl.where(inside, q, -INF)
    best = tl.max(kept, 0)
    place = tl.min(tl.where((kept == best) & inside, offs, 2147483647), 0)
    return best, tl.where(place == 2147483647, -1, place)


@jit
def find_largest(
    target,
    row,
    stride,
    classes,
    but,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):
    """The largest probability of a row, its class, and the sum, all without the class `but`."""
    best, place = tl.full((), -INF, REAL), tl.full((), -1, tl.int32)
    mass = tl.full((), 0, REAL)
    if ONE:
        offs = tl.arange(0, BLOCK)
        inside = offs < classes
        q = tl.where(offs == but, 0.0, tile(target, row, stride, offs, inside, 0.0, WHOLE, REAL))
        best, place = largest(q, offs, inside & (offs != but))
        mass = tl.sum(q, 0)
    else:
        for start in range(0, classes, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            inside = offs < classes
            q = tile(target, row, stride, offs, inside, 0.0, WHOLE, REAL)
            q = tl.where(offs == but, 0.0, q)
            of_tile, there = largest(q, offs, inside & (offs != but))
            place = tl.where(of_tile > best, there, place)
            best = tl.where(of_tile > best, of_tile, best)
            mass += tl.sum(q, 0)
    return tl.where(place < 0, 0.0, best), tl.maximum(place, 0), mass


@jit
def read_label(
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
    """The label, its probability, that of all other classes, and whether the row counts.

    TARGET: 0 there is none (the label is -1), 1 class indices, 2 class probabilities.
    """
    value, rest = tl.full((), 1, REAL), tl.full((), 0, REAL)
    if TARGET == 1:
        y = tl.load(target + row * stride)
        valid = y != ignore
        inside = (y >= 0) & (y < classes)
        tl.device_assert((valid == 0) | inside, "kdfuse: target outside the classes")
        y = tl.where(valid & inside, y, 0).to(tl.int32)
        return y, value, rest, valid
    elif TARGET == 2:
        value, y, _ = find_largest(target, row, stride, classes, -1, WHOLE, REAL, BLOCK, ONE)
        _, _, rest = find_largest(target, row, stride, classes, y, WHOLE, REAL, BLOCK, ONE)
        return y, value, rest, y >= 0
    else:
        return tl.full((), -1, tl.int32), value, rest, row >= 0


@jit
def second_label(
    target,
    row,
    stride,
    classes,
    first,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):
    """Of a mixed label: the second class (-1 where its probability is 0), its value, the rest's."""
    value, y, rest = find_largest(target, row, stride, classes, first, WHOLE, REAL, BLOCK, ONE)
    there = value > 0
    value = tl.where(there, value, 0.0)
    return tl.where(there, y, -1), value, rest - value
