"""What the benchmark counts instead of timing: launches, host time, memory, errors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .peers import Case
from .timing import Work, quantile


@dataclass(frozen=True)
class Truth:
    """A case's loss and gradients, by its eager form in float64."""

    loss: Tensor
    gradients: Sequence[Tensor]


def truth(case: Case, arguments: list[Tensor]) -> Truth:
    exact = [x.detach().double() if x.is_floating_point() else x for x in arguments]
    trained = [x.requires_grad_() for x in exact[: case.trained]]
    loss = case.eager(*exact)
    return Truth(loss.detach(), torch.autograd.grad(loss, trained))


def errors(loss: Callable[..., Tensor], exact: Truth, arguments: list[Tensor]) -> dict[str, float]:
    """Relative error of the loss, and the largest of a gradient over the largest gradient.

    Takes copies of the arguments, since a peer may write over them.
    """
    own = [x.detach().clone().requires_grad_(x.requires_grad) for x in arguments]
    value = loss(*own)
    made = torch.autograd.grad(value, own[: len(exact.gradients)])
    worst = max((m.double() - t).abs().max() for m, t in zip(made, exact.gradients, strict=True))
    largest = max(t.abs().max() for t in exact.gradients)
    off = (value.detach().double() - exact.loss).abs() / exact.loss.abs()
    return {"loss_error": float(off), "gradient_error": float(worst / largest)}


class Dispatched(TorchDispatchMode):
    """Counts the torch ops that a call dispatches and that are no mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def torch_ops(work: Work) -> int:
    """Torch ops of a forward and backward pass: on a CPU, the loops over the logits at most."""
    with Dispatched() as seen:
        work.both(work.sets[0])
    return seen.count


def launches(work: Work) -> int:
    """Kernels, copies and fills that a forward and backward pass puts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work.both(work.sets[0])
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(e.device_type == on_gpu and not e.is_user_annotation for e in seen.events())


def host_time(work: Work, calls: int = 20) -> float:
    """Median seconds that the host takes to enqueue a forward and backward pass on an idle GPU."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work.both(work.sets[0])
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return quantile(times, 0.5)


def peak_memory(work: Work) -> int:
    """Bytes on the GPU that a forward and backward pass takes beyond its inputs, at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.both(work.sets[0])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gauges(work: Work, device: str, traced: bool) -> dict[str, int | float | None]:
    """The counts of a provider; None where the device has no such thing.

    A dispatch mode keeps torch.compile from its compiled code, so `traced` work has no torch_ops.
    """
    work.both(work.sets[0])
    if device == "cuda":
        return {
            "launches": launches(work),
            "torch_ops": None,
            "host_us": host_time(work) * 1e6,
            "peak_bytes": peak_memory(work),
        }
    ops = None if traced else torch_ops(work)
    return {"launches": None, "torch_ops": ops, "host_us": None, "peak_bytes": None}
