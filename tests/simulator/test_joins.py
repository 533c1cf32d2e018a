"""What a row of the fast kernels waits for: barriers, shuffles and remote stores, to the last one.

A row costs its joins, in which all threads of its team come to the same numbers, and the shuffles
by which the lanes of a warp share out its softmaxes; a student with one teacher has one join. What
a launch costs once cancels between calls of few and of many rows in the same grid.
"""

from dataclasses import astuple, dataclass

import pytest
import torch
from calls import arguments
from sass import Kernel
from simulator import Counts, Gpu, Launched, device
from test_cuda_build import the_table
from test_kernels import LONG, a_case

pytestmark = pytest.mark.slow(15)

# The numbers that a row is summed up to (Sums in coefficients.h), with a label and without. At T
# the student (WTTM's stays at 1), the teacher and their mixed sum; at T = 1 the student, with NKD
# and WTTM the teacher; the label's rank.
SUMMED = {"kd": 3 + 1 + 1, "dkd": 3 + 1 + 1, "nkd": 3 + 2 + 1, "wttm": 2 + 2 + 1, "tf_nkd": 1 + 1}
BARE_SUMMED = {"kd": 3, "wttm": 2 + 2}
# Softmaxes that the lanes of a warp share out (split_all), five numbers of each: of the student and
# the teacher at T and of the student at 1; with NKD of both at 1; with WTTM of the student at 1 and
# of the teacher at both. Without a label two numbers of each (split_rest). The one of TF-NKD every
# thread makes for itself.
SHARED = {"kd": 3, "dkd": 3, "nkd": 2, "wttm": 3, "tf_nkd": 0}
BARE_SHARED = {"kd": 2, "wttm": 3}


def peaks(kernel: Kernel) -> list[int]:
    """What is joined to find a row's peaks: words, of 16-bit rows two peaks in one."""
    slts = int(kernel.variant) if kernel.loss == "slkd" else 0
    inputs = {"tf_nkd": 1, "slkd": 2 + slts}.get(kernel.loss, 2) + (kernel.variant == "two")
    whole = kernel.type == "f32" or kernel.variant in ("mixed", "soft")
    words = inputs if whole else (inputs + 1) // 2
    # The fused SL-Ts have their own; of class probabilities there is the likeliest class.
    return [words, 1] if kernel.loss == "slkd" or kernel.variant == "soft" else [words]


@dataclass(frozen=True)
class Meeting:
    """A join: how many numbers of each kind; and the shuffles behind it."""

    numbers: list[int]
    beside: int = 0


def meetings(kernel: Kernel) -> list[Meeting]:
    """Of a row. The peaks of the next row come with a row's last sums; a row that is read twice has
    its own.
    """
    if kernel.loss == "slkd":
        # Sums: the student at T and at 1, the teacher and the fused SL-Ts, each alone and mixed
        # with the student, a rank; then of each SL-T its own at T and at 1, mixed with the teacher,
        # a rank.
        slts = [Meeting([2 + 1 + 1], 2 * 5) for _ in range(int(kernel.variant))]
        last = Meeting([*slts.pop().numbers, *peaks(kernel)], 2 * 5)
        return [Meeting([2 + 2 * 2 + 1], 4 * 5), *slts, last]
    bare = kernel.variant == "bare"
    summed = (BARE_SUMMED if bare else SUMMED)[kernel.loss]
    shared = 2 * BARE_SHARED[kernel.loss] if bare else 5 * SHARED[kernel.loss]
    if kernel.variant == "two":
        summed, shared = summed + 2, shared + 5
    if kernel.variant == "soft":  # their mass and product with the student; no softmax has a label
        summed, shared = summed + 2, 2 * SHARED[kernel.loss]
    scored = kernel.loss == "tf_nkd"  # goes over its rows before the batch's mean is known, too
    if kernel.kind == "fast_streams":
        row = [Meeting([1 if scored else 2]), Meeting([summed], shared)]
        return 2 * row if scored else row
    both = [summed, *peaks(kernel)]
    return [Meeting(both)] * scored + [Meeting(both, shared)]


def of_a_warp(numbers: int) -> int:
    """Shuffles of a join in one warp: five steps for each number. They go four at a time
    (join_four): in two steps, of two shuffles and of one, a lane comes to have one of them, three
    steps end it, and all four are told to all.
    """
    return (2 + 1 + 3 + 4) * (numbers // 4) + 5 * (numbers % 4)


def groups(numbers: int, most: int) -> list[int]:
    return [min(most, numbers - k) for k in range(0, numbers, most)]


def of_parts(numbers: int, parts: int) -> int:
    """Shuffles in which a warp joins parts that lie beside each other (join_parts): so many numbers
    at a time as have room in 32 lanes, log2(parts) steps, then each is told to all.
    """
    steps = parts.bit_length() - 1
    return sum(steps + (m if m > 1 else 0) for m in groups(numbers, 32 // parts))


def into_parts(numbers: int) -> int:
    """Shuffles in which a warp comes to its part of a block's numbers: four at a time as above, but
    told to nobody, a single one in five steps.
    """
    return sum(5 if m == 1 else 2 + 1 + 3 for m in groups(numbers, 4))


def a_row(kernel: Kernel, launch: Launched, found: list[Meeting]) -> Counts:
    if kernel.kind == "fast_warps":
        return Counts(shuffles=sum(m.beside + sum(map(of_a_warp, m.numbers)) for m in found))
    # One barrier a join, behind which all warps read what all have written.
    blocks, warps = launch.cluster, launch.threads // 32
    numbers = [n for meeting in found for n in meeting.numbers]
    each = sum(meeting.beside for meeting in found) + sum(map(into_parts, numbers))
    if kernel.kind != "fast_clusters":
        each += sum(of_parts(n, 8) for n in numbers)
        return Counts(block_barriers=len(found), shuffles=warps * each)
    # In a cluster one warp of a block does, four numbers at a time in three steps, and sends them
    # to every block; all blocks meet, and join up to 16 parts.
    each += sum(of_parts(n, 16) for n in numbers)
    one = sum(3 * len(groups(n, 4)) for n in numbers)
    return Counts(
        block_barriers=blocks * len(found),
        shuffles=blocks * (warps * each + one),
        cluster_barriers=len(found),
        remote_stores=sum(numbers) * blocks * (blocks - 1),
    )


OLD = device("A100", processors=1)
# KB of a multiprocessor that has room for one block of a warp.
NARROW = {"bf16": {"mixed": 22, "two": 22, "soft": 32}, "f32": {"two": 36, "soft": 36}}


def calls(kernel: Kernel):
    """GPU, classes, and two numbers of rows that its blocks, all in use, take in turn."""
    long = LONG.get(kernel.loss, {}).get(kernel.type, 8250)
    middle = 700 if kernel.loss == "slkd" else 1500
    narrow = NARROW.get(kernel.type, {}).get(kernel.variant, 24 if kernel.type == "f32" else 16)
    # Of three inputs in float32 a multiprocessor holds one block.
    one, two, eight = (device(processors=n) for n in (1, 2, 8))
    four, more = two, eight
    if kernel.type == "f32" and kernel.variant in ("two", "soft"):
        four, more = device(processors=4), device(processors=16)
    return {
        "fast_warps": [(one, 33, 12, 24)],
        "fast_blocks": [
            (device(processors=1, memory_of_processor=narrow << 10), 100, 1, 4),
            (one, middle, 4, 8),
            (one, middle, 12, 24),
        ],
        "fast_clusters": [(two, long, 2, 4), (four, 2 * long + 3, 1, 3), (more, 8 * long, 1, 2)],
        "fast_streams": [(OLD, 8251, 1, 3)],
    }[kernel.kind]


def more(library, kernel, gpu, c, few, many, ignored=False) -> tuple[Launched, Counts]:
    """What the call of many rows takes beyond the one of few."""
    got = []
    for n in (few, many):
        case, settings = a_case(kernel, n, c)
        if case.target is not None and case.target.dim() == 1:
            case.target[:] = torch.arange(n) % c
            case.target[few:] = -100 if ignored else 1
        inputs = arguments(kernel.loss, case, **settings)
        got.append(Gpu(library, gpu).run(kernel.loss, *inputs, reduction="mean"))
    assert got[0].launches == got[1].launches
    assert [x.kernel for x in got[0].launches] == [str(kernel)]
    two = zip(astuple(got[1].counts), astuple(got[0].counts), strict=True)
    return got[0].launches[0], Counts(*[a - b for a, b in two])


FAST = sorted((k for k in the_table() if k.kind.startswith("fast")), key=str)


@pytest.mark.parametrize("kernel", FAST, ids=str)
def test_a_row(library, kernel):
    for gpu, c, few, many in calls(kernel):
        launch, found = more(library, kernel, gpu, c, few, many)
        one = a_row(kernel, launch, meetings(kernel))
        assert found == Counts(*[(many - few) * x for x in astuple(one)])


@pytest.mark.parametrize("kernel", [k for k in FAST if k.variant not in ("bare", "soft")], ids=str)
def test_an_ignored_row(library, kernel):
    """The next row's peaks are joined all the same; a row that is read twice is left out first."""
    gpu, c, few, many = calls(kernel)[:2][-1]
    launch, found = more(library, kernel, gpu, c, few, many, ignored=True)
    met = [] if kernel.kind == "fast_streams" else [Meeting(peaks(kernel))]
    one = a_row(kernel, launch, 2 * met if kernel.loss == "tf_nkd" else met)
    assert found == Counts(*[(many - few) * x for x in astuple(one)])
