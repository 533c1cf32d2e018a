"""Where the processes of a group first meet, also those that torchrun has started again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

LIFE = "kdfuse/life"
JOINING = 60.0  # seconds that the others have at least to be started and to import PyTorch


class NobodyMet(RuntimeError):
    """The processes of a run did not come together."""


@contextmanager
def met(rank: int, timeout: float) -> Iterator[None]:
    """Within, a failure to meet the other processes is NobodyMet, with what was waited for."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NobodyMet(
            f"process {rank} did not meet the others at {place} (MASTER_ADDR, MASTER_PORT) within "
            f"{max(timeout, JOINING):g} s (run.timeout, {JOINING:g} at least): {first}; see "
            "whether all of them were started, with the same place and WORLD_SIZE, and whether the "
            "port is free"
        ) from error


def meet(timeout: float) -> tuple[dist.Store, int, int]:
    """A store of these processes alone, the rank of this one, and how many there are.

    torchrun keeps one store for all lives of a job (issue 135712 of PyTorch), where processes that
    it starts again would read the addresses of the dead. So the first one names their life, and
    another one takes a name only once it has been answered by it, which the dead do not.
    """
    limit = timedelta(seconds=max(timeout, JOINING))
    store, rank, world = next(rendezvous("env://", timeout=limit))
    if rank == 0:
        life = uuid4().hex
        store.set(LIFE, life)
        for other in range(1, world):
            greeting = store.get(f"{life}/{other}").decode()
            store.set(f"{life}/{greeting}", "")
        return dist.PrefixStore(life, store), rank, world
    greeting = uuid4().hex
    while True:
        life = store.get(LIFE).decode()
        store.set(f"{life}/{rank}", greeting)
        with suppress(dist.DistStoreError):  # nobody answers: the name is an old one
            store.wait([f"{life}/{greeting}"], timedelta(seconds=1))
            return dist.PrefixStore(life, store), rank, world


def board() -> dist.Store:
    """Where the processes of this group tell each other in words, beside its collectives."""
    return dist.PrefixStore("kdfuse", dist.distributed_c10d._get_default_store())
