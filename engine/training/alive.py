"""That a process of a run is alive: its thread raises a count, which those that wait look at.

A wait in words has no limit of time, for one process may work alone for long (peers.py). One that
was killed, or stopped, says nothing; all that shows it is that its count stands still. Where the
counts themselves are kept by a process that hangs, each call to it waits for ever, and nobody can
be told: a second thread ends the process.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from .rendezvous import board

BEAT = 1.0  # seconds between two signs of life
_started = threading.Lock()  # taken by the thread of this process, and never let go
_waiting = ""  # for what this process waits in words


def show(rank: int, timeout: float) -> None:
    """From now on, to the end of the process, show that this one is alive. Again: nothing.

    While it waits in words and the store answers nobody for `timeout` seconds, the process ends
    with exit code 2.
    """
    if not _started.acquire(blocking=False):
        return
    store, ended = board().clone(), threading.Event()  # a connection is one thread's
    answered = [time.monotonic()]

    def beat() -> None:
        with suppress(dist.DistError):  # the store is gone: whoever waits finds that out
            while not ended.wait(BEAT):
                store.add(_key(rank), 1)  # which is answered, as `set` is not
                answered[0] = time.monotonic()
            return
        ended.set()

    def guard() -> None:
        while not ended.wait(BEAT):
            if _waiting and time.monotonic() - answered[0] > timeout:
                print(
                    f"error: process 0 hangs, or torchrun on its machine: process {rank} waited, "
                    f"{_waiting}, and what the processes meet through has not answered for "
                    f"{timeout:g} s (run.timeout)",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)  # the main thread waits in a call that no exception reaches

    threads = [threading.Thread(target=run, name="alive", daemon=True) for run in (beat, guard)]
    for thread in threads:
        thread.start()

    @atexit.register  # before the process group is destroyed: what is registered last comes first
    def end() -> None:
        ended.set()
        for thread in threads:
            thread.join(2 * BEAT)


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Within, the main thread waits in words for other processes."""
    global _waiting
    before, _waiting = _waiting, doing
    try:
        yield
    finally:
        _waiting = before


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
