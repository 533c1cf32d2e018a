"""Draws of a teacher's classes, from which a row's probabilities are estimated without bias.

N rows, C classes, n draws a row. Every number is a hash of (a row's key, the draw's place) in int64
arithmetic, so that a row's draws depend neither on the rows beside it nor on the device.
"""

import torch
from torch import Tensor

from .checks import check_range, check_target

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as the signed integer of the same bits
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def sample(
    teacher: Tensor,  # (N, C)
    n: int,
    *,
    temperature: float,
    keep: int,
    label: Tensor | None,  # (N,) int64, all of them classes
    keys: Tensor,  # (N,) int64
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values (N, k), indices (N, k) and mass of `SparseTeacher.sample`, in float64."""
    classes = teacher.shape[1]
    kept = largest(teacher, keep)
    if label is not None:
        kept = kept.scatter(1, label[:, None], True)
    log_p = (teacher.double() / temperature).log_softmax(1)
    rest = log_p.masked_fill(kept, -torch.inf)
    drawn = draw(rest, uniforms(keys, n))
    counts = torch.zeros_like(log_p, dtype=torch.int64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn))

    # Kept classes, then drawn ones, then others: no two of a row tie, so that each row has the
    # same list on every device.
    place = torch.arange(classes - 1, -1, -1, device=teacher.device)
    order = torch.where(kept, n + 1, counts) * classes + place
    indices = order.topk(min(keep + (label is not None) + n, classes), dim=1).indices
    of_drawn = (counts.gather(1, indices).double() / n).log() + rest.logsumexp(1, keepdim=True)
    log_q = torch.where(kept.gather(1, indices), log_p.gather(1, indices), of_drawn)
    values = temperature * log_q
    if indices.shape[1] < classes:
        return values, indices, None
    # A list holds all classes but one, whose probability is then the mass that is left out.
    return values[:, :-1], indices[:, :-1], log_q[:, -1].exp()


def largest(x: Tensor, k: int) -> Tensor:
    """(N, C) bool: the k largest of each row, of equal ones the first (topk promises no order)."""
    if k == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    least = x.topk(k, dim=1).values[:, -1:]
    above, equal = x > least, x == least
    return above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))


def draw(log_weights: Tensor, u: Tensor) -> Tensor:
    """(N, n) classes with probabilities proportional to exp(log_weights) (N, C), float64.

    Draw i falls into the i-th of n equal parts of the cumulative sum, at u[:, i] in [0, 1) of it
    (stratified sampling). Each class is still drawn n times its probability in the mean, and no
    weighted sum of the counts varies more than under draws from the whole of it: what the parts
    differ by among themselves adds nothing.
    """
    # Whole numbers, whose sums have no order, of 2^52 in all: a weight is right to 2^-53 of them.
    weights = (log_weights.softmax(1).nan_to_num(0.0) * 2.0**52).round().long()
    cdf = weights.cumsum(1)
    total, n = cdf[:, -1:], u.shape[1]
    part = (torch.arange(n, device=u.device) + u) / n
    wanted = (part * total).long()
    # Rounded up to the total it would find the end of the row, whatever class stands there.
    return torch.searchsorted(cdf, torch.minimum(wanted, total - 1), right=True)


def uniforms(keys: Tensor, n: int) -> Tensor:
    """(N, n) float64 in [0, 1): of a key (N,) and the place of the draw alone."""
    counters = torch.arange(n, device=keys.device)
    # Mixed twice: were both mixed alike, draw 5 of key 3 would be draw 3 of key 5.
    streams = mix(mix(keys))[:, None]
    return shifted(mix(streams ^ mix(counters)), 11).double() * 2.0**-53


def row_keys(seed: int | Tensor, teacher: Tensor) -> Tensor:
    """(N,) int64: the keys given, or those of the rows' places in the batch under an int."""
    rows = teacher.shape[0]
    if not isinstance(seed, Tensor):
        if not isinstance(seed, int):
            raise TypeError(f"seed must be an int or an int64 tensor, got {type(seed).__name__}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")
        place = torch.arange(rows, device=teacher.device)
        return mix(torch.full_like(place, seed)) ^ place
    if seed.dtype != torch.int64:
        raise TypeError(
            f"seed must be an int or an int64 tensor, got {seed.dtype}; use seed.long()"
        )
    if seed.shape != (rows,):
        raise ValueError(f"seed must have shape ({rows},), got {tuple(seed.shape)}")
    check_beside("seed", seed, teacher)
    return seed


def label_of(target: Tensor, teacher: Tensor, ignore_index: int, tracing: bool) -> Tensor:
    """(N,) int64 within the classes; 0 in rows that take no part."""
    if isinstance(target, Tensor):
        check_beside("target", target, teacher)
    check_target(target, teacher, False, "SparseTeacher.sample")
    if not tracing:
        check_range(target, teacher.shape[1], ignore_index)
    return torch.where(target == ignore_index, 0, target)


def check_counts(n: int, keep: int, label: bool, classes: int) -> None:
    for name, value in (("n", n), ("keep", keep)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}; top_k(rest='drop') draws nothing")
    if not 0 <= keep <= classes - 2 - label:
        beside = " beside the label" if label else ""
        raise ValueError(
            f"keep is {keep}, but of {classes} classes 0 to {classes - 2 - label} can be kept"
            f"{beside}, as two at least are to be drawn from; pass all of them as whole logits"
        )


def check_beside(name: str, x: Tensor, teacher: Tensor) -> None:
    if x.device != teacher.device:
        raise ValueError(f"{name} is on {x.device}, teacher on {teacher.device}; move one of them")


def mix(x: Tensor) -> Tensor:
    """The step of splitmix64, a bijection of 64-bit words (Steele et al. 2014)."""
    x = x + GOLDEN
    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros: of int64 >> repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
