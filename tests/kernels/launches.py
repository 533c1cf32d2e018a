"""What the project's launcher does on a GPU that is not there: asked of the simulator's runtime,
which takes launches down and runs none, with the registers and the memory of the real kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import simulator
import torch
from calls import Case, arguments
from gpus import BLOCKS, GPUS, REGISTERS, RESERVED, WARPS, Gpu
from sass import Kernel
from simulator import Launched

TYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
BYTES = {"bf16": 2, "f32": 4}
WARP_ROWS = 4  # of a block, where each warp has one
SETTINGS = {
    "kd": {"temperature": 4.0, "kd_weight": 0.9, "ce_weight": 0.1},
    "slkd": {"temperature": 4.0},
}
Facts = Callable[[Kernel], tuple[int, int]]  # of a kernel: registers, its own shared memory


@dataclass(frozen=True)
class Size:
    """loss: "kd" with labels and cross-entropy, or "slkd" with two SL-Ts."""

    loss: str
    rows: int
    classes: int
    type: str

    @property
    def inputs(self) -> int:
        return 4 if self.loss == "slkd" else 2

    @property
    def gradients(self) -> int:
        return self.inputs - 1

    def __str__(self) -> str:
        loss = "SLKD K=2" if self.loss == "slkd" else "KD+CE"
        return f"{loss} ({self.rows}, {self.classes}) {self.type}"


@dataclass(frozen=True)
class Launch:
    """A launch, and what of it an SM holds at a time."""

    kernel: Kernel
    blocks: int
    threads: int
    cluster: int
    bytes: int
    resident: int  # blocks of an SM

    @property
    def teams(self) -> int:
        """Rows that are worked on at a time."""
        return self.blocks * WARP_ROWS if self.by_warps else self.blocks // self.cluster

    @property
    def by_warps(self) -> bool:
        return self.kernel.kind == "fast_warps"

    @property
    def team_threads(self) -> int:
        return 32 if self.by_warps else self.threads * self.cluster

    @property
    def staged(self) -> int:
        """Bytes of a thread in shared memory, where it has places of its own there; what a block
        has beside them is less than 16 bytes of a thread."""
        return self.bytes // self.threads // 16 * 16


def kernel_of(name: str) -> Kernel:
    return Kernel(*name.split("-"))


def resident(gpu: Gpu, registers: int, threads: int, memory: int) -> int:
    """Blocks of an SM: the CUDA occupancy rule. Warps are given registers in parts of 256, and each
    belongs to one of four register files; memory: of a block, its kernel's own and the other.
    """
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // of_warp * 4 // warps
    return min(by_registers, WARPS // warps, gpu.memory_of_sm // (memory + RESERVED), BLOCKS)


def clusters(gpu: Gpu, blocks: int, resident: int) -> int:
    """Clusters of so many blocks that run at a time: each lies in one GPC."""
    return sum(sms * resident // blocks for sms in gpu.clusters)


def case_of(size: Size) -> Case:
    """Tensors whose memory nobody touches."""
    shape, dtype = (size.rows, size.classes), TYPES[size.type]
    students = [torch.empty(shape, dtype=dtype) for _ in range(size.gradients)]
    target = torch.zeros(size.rows, dtype=torch.int64)
    return Case(students, [torch.empty(shape, dtype=dtype)], target)


def ask(library: Path, name: str, size: Size, facts: Facts) -> Launch:
    """The launch of a forward pass with gradient under a mean. What the launcher chooses hangs on
    the kernel's registers, which are known once it has chosen: it is asked until both agree.
    """
    gpu, case = GPUS[name], case_of(size)
    inputs = arguments(size.loss, case, **SETTINGS[size.loss])
    found: Launched | None = None
    for _ in range(4):
        last = found
        registers, own = facts(kernel_of(last.kernel)) if last else (168, 5648)
        device = simulator.whole(name, registers=registers, static_bytes=own)
        found = simulator.Gpu(library, device).run(size.loss, *inputs, reduction="mean").launches[0]
        if last and found == last:
            break
    else:
        raise AssertionError(f"{size} on {name}: the launcher does not settle")
    registers, own = facts(kernel_of(found.kernel))
    fit = resident(gpu, registers, found.threads, found.bytes + own)
    blocks = found.blocks
    if found.cluster > 1:
        blocks = min(blocks, clusters(gpu, found.cluster, fit) * found.cluster)
    else:
        assert blocks <= fit * gpu.sms, "the launcher's occupancy and this one differ"
    return Launch(kernel_of(found.kernel), blocks, found.threads, found.cluster, found.bytes, fit)
