"""The statistics of rows whose classes are in parts, and how those of all parts become one.

A part packs each row into one row of float64, whatever the logits' type: peaks are absolute logits
and their differences must be exact, and the rows are short. The columns (csrc/sharded/types.h):
    the label's place counted from the part's first class (-1: no label), classes of the part
    for each set of logits (students, teachers, SLKD's fused teacher): the peak over j != y (-inf:
        none), the sum of exp((x_j - peak) / T), that of exp(x_j - peak) where a loss reads it,
        the label's logit (-inf: in another part)
    for each pair of teacher t and student z: the sum of exp((t_j - peak_t) / T) times
        (t_j - peak_t) / T - (z_j - peak_z) / T, or, of a loss without the teacher's entropy,
        times (z_j - peak_z) / T
T is the set's own: a student's may be 1 under teachers at another.
    for each student: its five largest logits over j != y, and how many classes of the part come
        before the label, at most 5
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..op import Op

HEAD, SET, RANKS, TOP = 2, 4, 6, 5


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a row stand, and what their merging depends on."""

    students: int
    sets: int
    pairs: tuple[tuple[int, int], ...]  # (teacher, student) as places among the sets
    temperatures: tuple[float, ...]  # of the sets
    entropy: bool  # whether a pair holds the teacher's exponents
    teacher_at_1: bool  # whether the teachers' sums at T = 1 are read

    @property
    def width(self) -> int:
        return HEAD + SET * self.sets + len(self.pairs) + RANKS * self.students

    def views(self, stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of stats (..., width): (..., 2), (..., sets, 4), (..., pairs), (..., students, 6)."""
        lengths = [HEAD, SET * self.sets, len(self.pairs), RANKS * self.students]
        head, sets, pairs, ranks = stats.split(lengths, -1)
        return (
            head,
            sets.unflatten(-1, (self.sets, SET)),
            pairs,
            ranks.unflatten(-1, (self.students, RANKS)),
        )


def layout(op: Op, students: int, teachers: int, params: list[float]) -> Layout:
    """That of an op with its params."""
    others = teachers + (op.fusion is not None)
    first = students
    pairs = [(first + k, 0) for k in range(teachers)]
    if op.fusion is not None:
        pairs += [(first + 1, 0), *((first, k) for k in range(1, students))]
    temperature = 1.0 if op.temperature is None else params[op.temperature]
    own = 1.0 if op.student_at_1 else temperature
    temperatures = (*[own] * students, *[temperature] * others)
    return Layout(
        students, students + others, tuple(pairs), temperatures, op.entropy, op.teacher_at_1
    )


def origin(sets: Tensor) -> Tensor:
    """(..., sets): the peak; where there is no rest the label, and 0 without either."""
    peak, label = sets[..., 0], sets[..., 3]
    label = torch.where(torch.isneginf(label), 0.0, label)
    return torch.where(torch.isneginf(peak), label, peak)


def merge(stats: Tensor, at: Layout) -> Tensor:
    """The statistics (N, S) of rows from those of the parts of their classes, (W, N, S).

    Each sum is rescaled from its own part's peak to the highest; a part without any class but the
    label, or with -inf alone, weighs exactly 0. Parts that lie side by side merge into what the
    statistics of their joint classes would be.
    """
    head, sets, pairs, ranks = at.views(stats)
    place, size = head.unbind(-1)  # (W, N)
    peak, total, total_at_one, label = sets.unbind(-1)  # (W, N, sets)
    whole = torch.stack([peak.amax(0), peak[0], peak[0], label.amax(0)], -1)
    fall = peak - origin(whole)
    fallen = fall / fall.new_tensor(at.temperatures)  # in units of each set's exponents
    weight = fallen.exp()
    whole[..., 1] = (total * weight).sum(0)
    whole[..., 2] = (total_at_one * fall.exp()).sum(0)

    merged = []
    for k, (t, z) in enumerate(at.pairs):
        shift = fallen[..., t] - fallen[..., z] if at.entropy else fallen[..., z]
        used = (total[..., t] != 0) & (weight[..., t] != 0)
        moved = pairs[..., k] + total[..., t] * shift
        merged.append(torch.where(used, weight[..., t] * moved, 0.0).sum(0))

    own = (place >= 0) & (place < size)
    top, rank = ranks[..., :TOP], ranks[..., TOP]  # (W, N, students, 5), (W, N, students)
    of_label = whole[..., : at.students, 3]
    earlier = (place >= size)[..., None, None]
    value = of_label[..., None]
    ahead = torch.where(earlier, ~(top < value), ~(top <= value))
    there = torch.arange(TOP, device=stats.device) < (size - own.to(size.dtype))[..., None, None]
    others = (ahead & there & ~own[..., None, None]).sum((0, -1))
    rank = (torch.where(own[..., None], rank, 0.0).sum(0) + others).clamp(max=TOP)
    rank = torch.where(own.any(0)[:, None], rank, 0.0)
    highest = top.permute(1, 2, 0, 3).flatten(-2).topk(TOP).values

    columns = [
        torch.stack([place.amax(0), size.sum(0)], -1),
        whole.flatten(-2),
        *(x[:, None] for x in merged),
        torch.cat([highest, rank[..., None]], -1).flatten(-2),
    ]
    return torch.cat(columns, -1)
