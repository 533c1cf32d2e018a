"""The time of a launch, from what the code gives and what gpus.py takes for granted.

    forward  = launch + first + max(memory, pipes, latency) + tail
    backward = launch + near
    copy     = launch + near + bytes / (copy's rate)

The page that model.py writes explains each of them.
"""

import math
from dataclasses import dataclass

from gpus import INGEST, L2, Gpu
from launches import BYTES, Launch, Size
from row_code import Code
from sass import Kernel

from kdfuse.kernels.table import OPS

SUM_UP = 200  # cycles: the sum of the labels that count over a block, in double
COUNTED_AHEAD = 8  # labels that a thread has on their way


@dataclass(frozen=True)
class Row:
    """What one row costs the team that has it; us, and cycles of each pipe for one warp."""

    open: float  # until the next row is sent for
    all: float
    busy: dict[str, float]
    stages: int  # rows on their way at a time; 0: a row is read while it is worked on
    in_flight: int  # bytes of a block


@dataclass(frozen=True)
class Prediction:
    gpu: Gpu
    size: Size
    launch: Launch
    moved: int  # bytes
    row: Row
    rounds: int
    limits: dict[str, float]  # us: memory, issue, another pipe, latency
    first: float
    tail: float

    @property
    def forward(self) -> float:
        return self.gpu.launch + self.first + max(self.limits.values()) + self.tail

    @property
    def backward(self) -> float:
        return self.gpu.launch + self.gpu.near

    @property
    def copy(self) -> float:
        return self.gpu.launch + self.gpu.near + needed(self.size) / rate(self.gpu)

    @property
    def share(self) -> float:
        """Of the speed of a copy, forward."""
        return self.copy / self.forward

    @property
    def share_of_both(self) -> float:
        """As the benchmark's share_of_copy: of forward and backward."""
        return self.copy / (self.forward + self.backward)

    @property
    def in_flight(self) -> int:
        """Bytes on their way of an SM, while none of its rows is taken."""
        return self.row.in_flight * blocks_of_sm(self.gpu, self.launch)

    @property
    def binds(self) -> str:
        most = max(self.limits, key=lambda limit: self.limits[limit])
        return most if 2 * self.limits[most] >= self.forward else "launch"


def rate(gpu: Gpu) -> float:
    """Bytes in a us."""
    return gpu.copy * 1e6


def needed(size: Size) -> int:
    """Each logit read once, each gradient written once."""
    return (size.inputs + size.gradients) * size.rows * size.classes * BYTES[size.type]


def asked_in_flight(gpu: Gpu, size: Size) -> float:
    """Little's law: what is read in the time that a read takes, of an SM."""
    reads = size.inputs / (size.inputs + size.gradients)
    return reads * rate(gpu) * gpu.loaded / gpu.sms


def blocks_of_sm(gpu: Gpu, launch: Launch) -> int:
    return min(launch.resident, -(-launch.blocks // gpu.sms))


def chunks_of(classes: int) -> int:
    """Groups of 8 classes on 16-byte boundaries, in the worst place."""
    return classes // 8 if classes % 8 == 0 else (classes + 14) // 8


def is_held(launch: Launch) -> bool:
    """Of a row that is read twice: shared memory has it for the second time."""
    return launch.bytes > 1024


def moved(gpu: Gpu, size: Size, launch: Launch) -> int:
    """A second read counts where the rows under way are more than half of L2."""
    if launch.kernel.kind != "fast_streams" or is_held(launch):
        return needed(size)
    again = size.inputs * size.classes * BYTES[size.type]
    fits = launch.teams * again <= gpu.cache * 1e6 / 2
    return needed(size) + (0 if fits else size.rows * again)


def resident_row(gpu: Gpu, size: Size, launch: Launch, code: Code) -> Row:
    """A row that stays in registers. A thread with fewer chunks than it could have takes a share
    of what it does for them; used: that share."""
    chunk = size.inputs * 8 * BYTES[size.type]
    used = math.ceil(chunks_of(size.classes) / launch.team_threads) * chunk / code.copied
    used = min(1.0, used)
    warps = 1 if launch.by_warps else -(-launch.threads // 128)

    def part(fixed: float, whole: float) -> float:
        return fixed + used * (whole - fixed)

    fixed, whole = code.fixed.chain(warps), code.row.chain(warps)
    busy = {k: part(code.fixed.busy[k], x) for k, x in code.row.busy.items()}
    for k, x in code.row.busy.items():  # one warp of a block sends
        busy[k] -= (x - code.plain.busy[k]) * (1 - 32 / launch.threads)
    stages = max(1, launch.staged // code.copied)
    cycle = gpu.clock * 1e3
    return Row(
        part(fixed.open, whole.open) / cycle,
        part(fixed.all, whole.all) / cycle,
        busy,
        stages,
        int(stages * used * code.copied * launch.threads),
    )


def streamed_row(gpu: Gpu, size: Size, launch: Launch, code: Code) -> Row:
    """A row that is read twice, in turns of a loop each: what memory adds to a turn is exposed."""
    chunks, warps = chunks_of(size.classes), -(-launch.threads // 128)
    first, second = code.loops
    loads = sum(i.name.startswith("LDG.E.128") for i in first.code)
    ahead = max(1, loads * 16 // (size.inputs * 8 * BYTES[size.type]))
    turns = math.ceil(chunks / (launch.threads * ahead)), math.ceil(chunks / launch.threads)
    cycle = gpu.clock * 1e3
    wait = gpu.loaded - L2 / cycle  # L2's is in the chain
    again = 0.0 if moved(gpu, size, launch) == needed(size) else wait
    all = code.row.chain(warps).all / cycle
    all += turns[0] * (first.chain(warps).all / cycle + wait)
    all += turns[1] * (second.chain(warps).all / cycle + again)
    parts = ((1, code.row), (turns[0], first), (turns[1], second))
    busy = {k: float(sum(n * part.busy[k] for n, part in parts)) for k in code.row.busy}
    return Row(0, all, busy, 0, loads * 16 * launch.threads)


def period(gpu: Gpu, row: Row) -> float:
    """Of the rows of a team, one after the other: its own work, and the way of a row from memory,
    which begins once another one has been taken."""
    if row.stages == 0:
        return row.all
    ingest = row.in_flight / row.stages / INGEST / (gpu.clock * 1e3)
    return max(row.all, (row.open + gpu.loaded + ingest) / row.stages)


def predict(gpu: Gpu, size: Size, launch: Launch, code: Code) -> Prediction:
    streamed = launch.kernel.kind == "fast_streams"
    row = (streamed_row if streamed else resident_row)(gpu, size, launch, code)
    return predicted(gpu, size, launch, row)


def predicted(gpu: Gpu, size: Size, launch: Launch, row: Row) -> Prediction:
    rounds = math.ceil(size.rows / launch.teams)
    cycle = gpu.clock * 1e3
    # Warps of an SM's part, of which there are four, in all rounds.
    turns = rounds * -(-launch.blocks // gpu.sms) * -(-launch.threads // 128)
    pipes = {k: turns * cycles / cycle for k, cycles in row.busy.items()}
    issue = pipes.pop("issue")
    other = max(pipes, key=lambda k: pipes[k])
    limits = {
        "memory": moved(gpu, size, launch) / rate(gpu),
        "issue": issue,
        other: pipes[other],
        "latency": (rounds - 1) * period(gpu, row) + row.all,
    }
    counts = math.ceil(size.rows / (COUNTED_AHEAD * launch.threads))
    first = gpu.near + ((counts - 1) * L2 + SUM_UP) / cycle
    return Prediction(
        gpu,
        size,
        launch,
        moved(gpu, size, launch),
        row,
        rounds,
        limits,
        first,
        tail(gpu, size, launch),
    )


def tail(gpu: Gpu, size: Size, launch: Launch) -> float:
    """A block's sums and its ticket take three ways to L2; the last block reads the sums of all, a
    warp a column, and writes the result."""
    columns = 1 + len(OPS[size.loss].terms(size.gradients))
    turns = math.ceil(columns / (launch.threads // 32)) * math.ceil(launch.blocks / 128)
    return (3 + turns + 1) * L2 / (gpu.clock * 1e3)


def is_modelled(kernel: Kernel) -> bool:
    """Rows of the general kernels are not."""
    return kernel.kind.startswith("fast_")
