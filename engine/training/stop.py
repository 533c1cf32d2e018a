"""Ending a run early, between two steps: by a signal to any of its processes, or before its time
is up."""

from __future__ import annotations

import signal
import threading
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ..run import job
from .ranks import Group

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TIME = 1  # among their numbers; SIGHUP's own, which is not taken
RESERVE = 60.0  # seconds that are left for the end at least


class Stopped(SystemExit):
    """A run was told to stop and did so, its checkpoint is written; the text says why.

    Nobody has to catch it: the process ends with `code`, which is 130 after Ctrl-C and 143 else,
    by which schedulers know a job that may go on.
    """

    def __init__(self, why: str) -> None:
        super().__init__(130 if why == signal.SIGINT.name else 143)
        self.why = why

    def __str__(self) -> str:
        return f"stopped by {self.why}"


class Stop:
    """Takes signals while it is entered, in the main thread, and watches the time.

    A second signal ends the process as if nobody had taken it. Not under torchrun, which hands on
    what its processes may have got themselves, and kills those that do not end.
    """

    def __init__(self, group: Group, limit: float | None, timeout: float = 600.0) -> None:
        """`limit`: minutes after the start of the job (see job.age); None for no end. `timeout`:
        seconds that a process waits for the others' answers."""
        self.why = ""  # the last answer of `asked`
        self._world, self._timeout = group.world, timedelta(seconds=timeout)
        self._end = float("inf") if limit is None else time.monotonic() + 60 * limit - job.age()
        self._asked = float("inf")  # when that was last
        self._longest = 0.0  # between two calls of it: with an evaluation or a checkpoint
        self._signal = 0
        self._before: dict[signal.Signals, Any] = {}
        self._on_its_way: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> Stop:
        if self._world > 1:
            # Of its own, on the host: it neither waits for a GPU nor for what goes on in the step.
            self._processes: Any = dist.new_group(backend="gloo", timeout=self._timeout)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                background = number == signal.SIGINT and before is signal.SIG_IGN
                if not background and before is not None:  # which could not be put back
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._world > 1 and kind is None:  # after an error the others may be gone
            if self._on_its_way:
                self._on_its_way[1].wait()
            dist.destroy_process_group(self._processes)

    def asked(self) -> str:
        """Why the run is to end after this step, "" where it is not.

        All processes ask after each step and get the same answer: of several, what the first of
        them knew a step ago, so that nobody waits for the exchange.
        """
        mine = self._signal or TIME * self._time_is_up()
        found = self._exchanged(mine) if self._world > 1 else mine
        if found:
            self.why = "run.time_limit" if found == TIME else signal.Signals(found).name
        return self.why

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if not job.under_torchrun():
            for taken in self._before:
                signal.signal(taken, signal.SIG_DFL)

    def _time_is_up(self) -> bool:
        """Whether what is left may be too short for one more evaluation and checkpoint."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked)
        self._asked = now
        return now + max(RESERVE, 2 * self._longest) >= self._end

    def _exchanged(self, mine: int) -> int:
        """The largest number that a process gave to the call before; `mine` goes on its way."""
        found = 0
        if self._on_its_way:
            flag, work = self._on_its_way
            work.wait()
            found = int(flag)
        self._on_its_way = None
        if not found:
            flag = torch.tensor(mine)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, self._processes, async_op=True)
            self._on_its_way = flag, work
        return found
