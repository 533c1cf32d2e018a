"""What a row of the fast kernels waits for: barriers, shuffles and remote stores, to the last one.

A row costs its joins, in which all threads of its team come to the same numbers, and the shuffles
by which the lanes of a warp share out its softmaxes; a student with one teacher has one join. What
a launch costs once cancels between calls of few and of many rows in the same grid.
"""

from dataclasses import astuple, replace

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
    inputs = {"tf_nkd": 1, "slkd": 2 + slts}.get(kernel.loss, 2)
    words = inputs if kernel.type == "f32" else (inputs + 1) // 2
    return [words, 1] if kernel.loss == "slkd" else [words]  # the fused SL-Ts have their own


def meetings(kernel: Kernel) -> list[list[int]]:
    """Of a row: each join, and how many numbers of each kind are joined in it.

    The peaks of the next row come with a row's last sums; a row that is read twice has its own.
    """
    if kernel.loss == "slkd":
        # Sums: the student at T and at 1, the teacher and the fused SL-Ts, each alone and mixed
        # with the student, a rank; then of each SL-T its own at T and at 1, mixed with the teacher,
        # a rank.
        *first, last = [2 + 2 * 2 + 1], *[[2 + 1 + 1]] * int(kernel.variant)
        return [*first, last + peaks(kernel)]
    summed = (BARE_SUMMED if kernel.variant == "bare" else SUMMED)[kernel.loss]
    if kernel.kind == "fast_streams":
        row = [[1 if kernel.loss == "tf_nkd" else 2], [summed]]
    else:
        row = [[summed, *peaks(kernel)]]
    return 2 * row if kernel.loss == "tf_nkd" else row  # once before the batch's mean is known


def shared(kernel: Kernel) -> int:
    """Shuffles of a warp."""
    if kernel.loss == "slkd":
        return 4 * 5 + int(kernel.variant) * 2 * 5
    return 2 * BARE_SHARED[kernel.loss] if kernel.variant == "bare" else 5 * SHARED[kernel.loss]


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


def a_row(kernel: Kernel, launch: Launched, found: list[list[int]], beside: int) -> Counts:
    """With so many shuffles of each warp beside the joins."""
    blocks, warps = launch.cluster, launch.threads // 32
    numbers = [n for meeting in found for n in meeting]
    if kernel.kind == "fast_warps":
        return Counts(shuffles=beside + sum(map(of_a_warp, numbers)))
    # One barrier a join, behind which all warps read what all have written.
    of_warps = sum(of_parts(n, 8) for n in numbers)
    each = beside + sum(map(into_parts, numbers))
    one = Counts(block_barriers=blocks * len(found), shuffles=blocks * warps * (each + of_warps))
    if kernel.kind != "fast_clusters":
        return one
    # Of each block one warp reads them and sends them to every block; all meet, and join up to 16
    # parts.
    each += sum(of_parts(n, 16) for n in numbers)
    return replace(
        one,
        shuffles=blocks * (warps * each + of_warps),
        cluster_barriers=len(found),
        remote_stores=sum(numbers) * blocks * (blocks - 1),
    )


ONE, TWO, EIGHT = (device(processors=n) for n in (1, 2, 8))
NARROW, WIDE = (device(processors=1, memory_of_processor=n << 10) for n in (16, 24))
OLD = device("A100", processors=1)


def calls(kernel: Kernel):
    """GPU, classes, and two numbers of rows that its blocks, all in use, take in turn."""
    long = LONG.get(kernel.loss, {}).get(kernel.type, 8250)
    middle = 700 if kernel.loss == "slkd" else 1500
    narrow = WIDE if kernel.type == "f32" else NARROW  # has room for one block of a warp
    return {
        "fast_warps": [(ONE, 33, 12, 24)],
        "fast_blocks": [(narrow, 100, 1, 4), (ONE, middle, 4, 8), (ONE, middle, 12, 24)],
        "fast_clusters": [(TWO, long, 2, 4), (TWO, 2 * long + 3, 1, 3), (EIGHT, 8 * long, 1, 2)],
        "fast_streams": [(OLD, 8251, 1, 3)],
    }[kernel.kind]


def more(library, kernel, gpu, c, few, many, ignored=False) -> tuple[Launched, Counts]:
    """What the call of many rows takes beyond the one of few."""
    got = []
    for n in (few, many):
        case, settings = a_case(kernel, n, c)
        if case.target is not None:
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
        one = a_row(kernel, launch, meetings(kernel), shared(kernel))
        assert found == Counts(*[(many - few) * x for x in astuple(one)])


@pytest.mark.parametrize("kernel", [k for k in FAST if k.variant != "bare"], ids=str)
def test_an_ignored_row(library, kernel):
    """The next row's peaks are joined all the same; a row that is read twice is left out first."""
    gpu, c, few, many = calls(kernel)[:2][-1]
    launch, found = more(library, kernel, gpu, c, few, many, ignored=True)
    met = [] if kernel.kind == "fast_streams" else [peaks(kernel)]
    one = a_row(kernel, launch, 2 * met if kernel.loss == "tf_nkd" else met, 0)
    assert found == Counts(*[(many - few) * x for x in astuple(one)])
