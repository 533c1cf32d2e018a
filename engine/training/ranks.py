"""The processes of a run: which one this is, on what device, and the sums they take together."""

import atexit
import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..data.schedule import share
from ..recipe.run import Run
from .alive import show
from .rendezvous import meet, met

# The option's name changed: newer releases warn about the old one, older ones lack the new.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"


@dataclass(frozen=True)
class Group:
    """This process (rank of world) and its device. All processes must make the same calls."""

    rank: int
    world: int
    device: torch.device
    local_rank: int = 0  # among those of this machine
    timeout: float = dist.default_pg_timeout.total_seconds()  # of a wait for one that is silent

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, batch: int, name: str) -> int:
        """This process's part of a global batch. ValueError when it does not divide evenly."""
        if batch % self.world:
            raise ValueError(
                f"{name} = {batch} does not divide over {self.world} processes; "
                f"set it to a multiple of {self.world}"
            )
        return batch // self.world

    def part(self, batch: int, name: str, unit: int = 1) -> range:
        """This process's places in a global batch, in whole units; see data.schedule.share."""
        try:
            return share(batch, self.rank, self.world, unit)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def min(self, value: Tensor) -> Tensor:
        """The smallest `value` of all processes, element by element, in place."""
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MIN)
        return value

    def all(self, value: Any) -> list[Any]:
        """The picklable `value` of every process, in order of rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Return when every process has come here."""
        self.sum(torch.zeros((), device=self.device)).item()  # a GPU's sum alone holds no one up

    def wrap(self, module: nn.Module, run: Run) -> nn.Module:
        """The module whose gradients are averaged over the processes; itself for one process."""
        if self.world == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Every process keeps its own BatchNorm statistics in training: no broadcast in each step.
        # average_batchnorm joins them before anything reads them.
        options: dict[str, Any] = {SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
        # Each step uses the same parameters, so that those without a gradient are looked for once.
        # Steps in several parts have passes without a reduction, which it does not take.
        options["static_graph"] = run.accumulate == 1
        wrapped = DistributedDataParallel(module, device_ids=ids, **options)
        if run.reduce == "bf16":
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def statistics(self, modules: Iterable[nn.Module]) -> list[Tensor]:
        """The running statistics among `modules` that are this process's own; none of one."""
        norms = [m for m in modules if isinstance(m, _BatchNorm) and self.world > 1]
        both = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
        return [value for value in both if value is not None]

    def average_batchnorm(self, modules: Iterable[nn.Module]) -> None:
        """Replace running statistics among `modules` by their mean over the processes."""
        for value in self.statistics(modules):
            dist.all_reduce(value)
            value /= self.world


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of "auto", "cpu" or "cuda". ValueError for cuda on a machine without."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError(
            "run.device = 'cuda', and this machine has no CUDA device that PyTorch can use; "
            "set run.device=auto or run.device=cpu"
        )
    return torch.device("cuda", local_rank) if there and name != "cpu" else torch.device("cpu")


def number(variable: str, default: int) -> int:
    """What torchrun, or who stands for it, says in the environment; ValueError for no number."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ValueError(f"{variable}={text!r} in the environment: wants a number from 0")
    return int(text)


def join(device: str, timeout: float | None = None) -> Group:
    """Join the processes that torchrun started, or be the only one; see `choose_device`.

    `timeout`: seconds that one may wait for the others in a collective, or for one that shows no
    sign of life elsewhere; None: as PyTorch has it.
    A process group that is there already is used as it is. One made here stays until the process
    ends, for its next run.
    """
    rank, world, local_rank = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    timeout = dist.default_pg_timeout.total_seconds() if timeout is None else timeout
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    elif world > 1:
        with met(rank, timeout):
            names = ("store", "rank", "world_size")
            place: dict[str, Any] = dict(zip(names, meet(timeout), strict=True))
            place["timeout"] = timedelta(seconds=timeout)
            if chosen.type == "cuda":
                dist.init_process_group("nccl", device_id=chosen, **place)
            else:
                dist.init_process_group("gloo", **place)
        atexit.register(dist.destroy_process_group)
    if world > 1:
        show(rank, timeout)
    return Group(rank, world, chosen, local_rank, timeout)
