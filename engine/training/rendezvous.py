"""Where the processes of a group first meet, also those that torchrun has started again."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

LIFE = "kdfuse/life"


def meet() -> tuple[dist.Store, int, int]:
    """A store of these processes alone, the rank of this one, and how many there are.

    torchrun keeps one store for all lives of a job (issue 135712 of PyTorch), where processes that
    it starts again would read the addresses of the dead. So the first one names their life, and
    another one takes a name only once it has been answered by it, which the dead do not.
    """
    store, rank, world = next(rendezvous("env://"))
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
