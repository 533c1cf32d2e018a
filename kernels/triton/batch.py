"""What a row needs of its batch, and the batch's numbers from its rows, in Triton.

Every program leaves its row's numbers in `values`, (N, COLUMNS); the last one to come sums them in
the order of the rows, in float64: the same bits every time, without a launch of its own. Which one
is the last says a counter that goes back to 0.
"""

from .lang import jit, tl
from .rows import number


@jit
def count_valid(target, stride, rows, ignore):
    BLOCK_N: tl.constexpr = 512
    valid = tl.full((), 0, tl.int32)
    for start in range(0, rows, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        y = tl.load(target + i.to(tl.int64) * stride, mask=i < rows, other=0)
        valid += tl.sum(((y != ignore) & (i < rows)).to(tl.int32), 0)
    return valid


@jit
def row_scale(batch, REAL: tl.constexpr, MEAN: tl.constexpr):
    """What each row's loss counts for in the op's.

    batch: how MEAN is made: 0 it is a sum; 1 of (denominator,); 2 of (N,), all rows count; 3 of the
    labels, which every program counts for itself; 4 of the count in the scratch.
    """
    denominator, scratch, target, stride, rows, ignore = batch
    if MEAN == 0:
        return number(1.0, REAL)
    elif MEAN == 1:
        return 1 / tl.load(denominator).to(REAL)
    elif MEAN == 2:
        return 1 / number(rows, tl.float64).to(REAL)
    elif MEAN == 3:
        valid = count_valid(target, stride, rows, ignore)
        return 1 / tl.maximum(valid, 1).to(REAL)
    else:
        return 1 / tl.maximum(tl.load(scratch), 1.0).to(REAL)


@jit(do_not_specialize=["stride", "rows", "ignore"])
def count_rows(target, scratch, stride, rows, ignore):
    """A launch of one program: the count of valid rows, where there are too many labels for all."""
    tl.store(scratch, count_valid(target, stride, rows, ignore).to(tl.float64))


@jit
def put_values(values, loss, row, numbers, valid, REDUCTION: tl.constexpr, COLUMNS: tl.constexpr):
    for i in tl.static_range(COLUMNS):
        x = tl.where(valid, numbers[i], 0.0)
        tl.store(values + row * COLUMNS + i, x)
        if REDUCTION == 0 and i == 0:
            tl.store(loss + row, x)


@jit
def is_last(counter):
    """Whether every other program has left its numbers; then they are visible to this one."""
    tl.debug_barrier()  # all threads have stored before one of them says so
    last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1
    return last


@jit
def sum_rows(values, rows, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """(WIDTH,) float64: the sums of the columns, 0 behind them."""
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((BLOCK_N, WIDTH), tl.float64)
    # Unrolled: nothing hides the latency of a load here, but other loads.
    for start in tl.range(0, rows, BLOCK_N, loop_unroll_factor=4):
        i = start + tl.arange(0, BLOCK_N)[:, None]
        inside = (i < rows) & (column < COLUMNS)
        at = values + i.to(tl.int64) * COLUMNS + column
        total += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(total, 0)


@jit
def total_rows(values, loss, terms, counter, batch, scale, ENDING: tl.constexpr):
    """The op's loss and terms. Column 0 is the loss; bit k of COUNTS: column k is a count."""
    TARGET: tl.constexpr = ENDING[0]
    REDUCTION: tl.constexpr = ENDING[1]
    COLUMNS: tl.constexpr = ENDING[2]
    WIDTH: tl.constexpr = ENDING[3]
    COUNTS: tl.constexpr = ENDING[4]
    LINES: tl.constexpr = ENDING[5]
    _, _, target, stride, rows, ignore = batch
    if is_last(counter):
        valid = number(rows, scale.dtype)
        if TARGET == 1:
            valid = count_valid(target, stride, rows, ignore).to(scale.dtype)
        sums = sum_rows(values, rows, COLUMNS, WIDTH, LINES).to(scale.dtype)
        column = tl.arange(0, WIDTH)
        mean = tl.where(((COUNTS >> column) & 1) == 1, 1.0, 1 / tl.maximum(valid, 1.0))
        result = sums * tl.where(column == 0, scale, mean)
        if REDUCTION != 0:
            tl.store(loss + column, result, mask=column == 0)
        tl.store(terms + column - 1, result, mask=(column > 0) & (column < COLUMNS))
        tl.store(terms + COLUMNS - 1, valid)
        tl.store(counter, 0)
