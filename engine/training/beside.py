"""What a run writes beside its checkpoints, and has to bring back to one it goes on from."""

from __future__ import annotations

from typing import Protocol


class Record(Protocol):
    """Something of every step, which a checkpoint is not to be ahead of."""

    def flush(self) -> None:
        """Have what was recorded until now on the disk, before a checkpoint is."""

    def finish(self, done: int, unreadable: list[dict[int, str]]) -> None:
        """What every process has flushed is that of the first `done` steps; with the images that
        each has found unreadable."""

    def rewind(self, done: int) -> None:
        """Forget what lies behind the first `done` steps; all processes call it."""
