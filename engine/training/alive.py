"""That a process of a run is alive: its thread raises a count, which those that wait look at.

A wait in words has no limit of time, for one process may work alone for long (peers.py). One that
was killed, or stopped, says nothing; all that shows it is that its count stands still.
"""

from __future__ import annotations

import atexit
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from .rendezvous import board

BEAT = 1.0  # seconds between two signs of life
_started = threading.Lock()  # taken by the thread of this process, and never let go


def show(rank: int) -> None:
    """From now on, to the end of the process, show that this one is alive. Again: nothing."""
    if not _started.acquire(blocking=False):
        return
    store, ended = board().clone(), threading.Event()  # a connection is one thread's

    def beat() -> None:
        count = 0
        with suppress(dist.DistError):  # the store is gone: whoever waits finds that out
            while not ended.wait(BEAT):
                count += 1
                store.set(_key(rank), str(count))

    thread = threading.Thread(target=beat, name="alive", daemon=True)
    thread.start()

    @atexit.register  # before the process group is destroyed: what is registered last comes first
    def end() -> None:
        ended.set()
        thread.join()


class Watch:
    """One process, as another one sees it that begins to wait for it."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._key, self._count = store, _key(rank), b""
        self._looked = self._changed = time.monotonic()

    def silent(self) -> float:
        """Seconds, as far as this one has seen, without a sign of life."""
        now = time.monotonic()
        if now - self._looked > BEAT:
            self._looked = now
            count = self._store.get(self._key) if self._store.check([self._key]) else b""
            if count != self._count:
                self._count, self._changed = count, now
        return now - self._changed


def _key(rank: int) -> str:
    return f"alive/{rank}"
