"""A tracker that is not a file: written to by a thread, since a network may fail and may hang."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Thread

PATIENCE = 20.0  # seconds that a run waits at its end; torchrun kills a process 30 after SIGTERM


class TrackerError(RuntimeError):
    """A tracker does not take what it is given; the text names it."""


class Remote:
    """Hands a run's numbers to a tracker in their order, without anybody's waiting for it."""

    def __init__(
        self,
        name: str,
        write: Callable[[int, Mapping[str, float]], object],
        finish: Callable[[bool], object],
    ) -> None:
        """`write` and `finish`, with whether the run is finished, are called by the thread; what
        they raise costs the run nothing but the numbers that they had."""
        self._name, self._write, self._finish = name, write, finish
        self._waiting: SimpleQueue[tuple[int, Mapping[str, float]] | bool] = SimpleQueue()
        self._error = ""  # the first
        self._told = False
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take values of a step by name. Raises TrackerError once, for any of those before."""
        self._waiting.put((step, values))
        if self._error and not self._told:
            self._told = True
            raise TrackerError(f"{self._error}; the run goes on, numbers are missing there")

    def close(self, finished: bool) -> str:
        """What is missing there, "" for nothing or what was told."""
        self._waiting.put(finished)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            return f"{self._name} did not take all numbers within {PATIENCE:g} s"
        return "" if self._told else self._error

    def _run(self) -> None:
        while True:
            given = self._waiting.get()
            try:
                if isinstance(given, bool):
                    self._finish(given)
                else:
                    self._write(*given)
            except Exception as error:  # of somebody else's code: whatever it is
                self._error = self._error or in_words(self._name, error)
            if isinstance(given, bool):
                return


def in_words(name: str, error: Exception) -> str:
    """An error of a tracker's, in one line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{name}: {type(error).__name__}: {first}"
