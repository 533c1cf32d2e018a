"""What a step is besides its time: arithmetic, ops, launches, the host's part, memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ....kernels.bench import gauges
from ....kernels.bench.timing import Work, quantile

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product is the peak
HOST_STEPS = 10


class Ops(TorchDispatchMode):
    """Counts the ops that do something: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function.overloadpacket.__name__
        self.count += not function.is_view and name not in ALLOCATIONS
        return function(*args, **(kwargs or {}))


def flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and matrix products, two for a multiply-add."""
    with FlopCounterMode(display=False) as counted:
        step()
    return counted.get_total_flops()


def ops(step: Callable[[], Any]) -> int:
    with Ops() as seen:
        step()
    return seen.count


def launches(step: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a step puts on the GPU."""
    return gauges.launches(Work([None], lambda _: step()))


def host_seconds(step: Callable[[], Any]) -> float:
    """Median time of the host to issue a step to an idle GPU."""
    times = []
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return quantile(times, 0.5)


def held() -> int:
    """Bytes of tensors on the GPU."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def peak_memory(step: Callable[[], Any], before: int) -> int:
    """Most bytes on the GPU in a step beyond those `before` its networks were made."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matmul_types(amp: str | None, device: torch.device) -> tuple[str, ...]:
    """The types in which a step's products may be computed; the faster one is what it can reach."""
    if amp == "bf16":
        # A CPU without instructions for bfloat16 computes its convolutions in float32.
        return ("bfloat16", "float32") if device.type == "cpu" else ("bfloat16",)
    # PyTorch's default for float32 convolutions on a GPU, not for matrix products.
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return ("tf32",) if tf32 else ("float32",)


class Matmul:
    """A large matrix product in one of `matmul_types`: the peak that a step is held against."""

    def __init__(self, kind: str, device: torch.device) -> None:
        side = SIDE[device.type]
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        self.tf32 = kind == "tf32"
        self.flops = 2 * side**3
        self.a, self.b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self.out = torch.empty_like(self.a)

    def __call__(self) -> None:
        was = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.mm(self.a, self.b, out=self.out)
        torch.backends.cuda.matmul.allow_tf32 = was


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within, what makes the host wait for the GPU is an error."""
    if device.type != "cuda":
        yield
        return
    was = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(was)
