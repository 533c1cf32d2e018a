"""What model.py takes for granted of each GPU: everything here is looked up or assumed.

Lengths of time are in us, latencies of instructions in cycles of a multiprocessor (SM).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    arch: str
    sms: int
    clock: float  # GHz under load
    copy: float  # TB/s read and written by a large copy
    datasheet: float  # TB/s
    cache: float  # MB of L2
    fp32_lanes: int  # products and sums in float32 of an SM in a cycle
    asked_bytes: int  # in flight an SM, by NVIDIA's tuning of a streaming kernel
    clusters: tuple[int, ...]  # SMs of each part (GPC) that a cluster has to lie in
    memory_of_sm: int = 228 << 10
    near: float = 0.5  # from memory, nothing else under way
    loaded: float = 0.8  # from memory, at the rate of a copy
    launch: float = 2.0  # from the end of one kernel to the first instruction of the next


GPUS = {
    "A100": Gpu(
        "sm_80",
        108,
        1.41,
        1.75,
        2.04,
        40,
        64,
        16 << 10,
        (16,) * 5 + (14,) * 2,
        memory_of_sm=164 << 10,
    ),
    "H100": Gpu("sm_90", 132, 1.75, 3.0, 3.35, 50, 128, 32 << 10, (18,) * 3 + (16,) * 4 + (14,)),
    "H200": Gpu("sm_90", 132, 1.75, 4.2, 4.8, 50, 128, 48 << 10, (18,) * 3 + (16,) * 4 + (14,)),
    "B200": Gpu(
        "sm_100", 148, 1.80, 6.8, 8.0, 126, 128, 64 << 10, (20,) * 2 + (18,) * 6, loaded=0.9
    ),
}

L2 = 270  # cycles
INGEST = 64  # bytes that an SM takes from L2 in a cycle
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of an SM
RESERVED = 1024  # bytes of shared memory of each block

# Cycles for which a warp's instruction holds its part of an SM, of which there are four with a
# scheduler each: 32 lanes over the results of an SM in a cycle, by 4. Those of float32 depend on
# the GPU.
PIPES = {"alu": 2, "special": 8, "shared": 4, "double": 4, "issue": 1}
# Cycles until a result can be read.
LATENCY = {"fp32": 4, "alu": 5, "special": 20, "shared": 27, "double": 10, "issue": 6}
MEETING = {"BAR": 30, "UCGABAR_WAIT": 200}

# (what, its source): the page prints them.
SOURCES = (
    (
        "SMs, datasheet bandwidth, L2, float32 lanes",
        "as NVIDIA publishes them (SXM; A100 of 80 GB), known second-hand; B200's SMs and L2 "
        "least surely",
    ),
    ("clock", "assumed: near the boost clock, under a load that memory binds"),
    (
        "copy",
        "assumed: 0.85 to 0.9 of the datasheet; H100: 2.9 to 3.0 TB/s are published for quack's "
        "streaming kernels",
    ),
    (
        "bytes asked for in flight",
        "NVIDIA CCCL, cub/device/dispatch/tuning/tuning_transform.cuh: 16 KB A100, 32 KB H100, "
        "48 KB H200, 64 KB B200",
    ),
    (
        "SMs of each GPC",
        "assumed, and they differ from chip to chip; H100: 120 of 132 SMs with clusters of 8 are "
        "reported in accel-sim/gpu-app-collection#87 and NVIDIA/cutlass#1921",
    ),
    (
        "registers, warps, blocks and shared memory of an SM",
        "CUDA C++ Programming Guide, technical specifications by compute capability",
    ),
    (
        "cycles of an instruction's pipe",
        "CUDA C++ Programming Guide, arithmetic throughput: results of an SM in a cycle are 16 for "
        "ex2 and its like, 64 for compare, logic, shift and conversion, 32 for shuffles, and 64 "
        "(A100) or 128 (H100 on) for float32; quoted from memory, look them up before relying on "
        "a bound by them",
    ),
    (
        "latencies of instructions, of L2 and of a cluster's barrier",
        "assumed; arXiv:2402.13499 and arXiv:2501.12084 measure such, and were not compared",
    ),
    ("latency of memory, alone and loaded; launch", "assumed"),
)
