"""What the loop asks of whatever is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from ..methods import Terms
from .state import State


class Task(Protocol):
    """A recipe's data and networks, ready to be trained: classification, detection."""

    state: State
    steps: int  # of an epoch
    facts: dict[str, Any]  # for the first record of the log
    results: tuple[str, ...]  # kept of the last and of the best evaluation; the first decides
    chance: float  # what a network that has learned nothing may reach of it

    def identity(self) -> dict[str, Any]:
        """What decides the run's batches, of JSON's types; the same in all processes."""

    def check_teachers(self) -> dict[str, float]:
        """Before the first step: measure the frozen teachers, for the log; ValueError for one
        that has nothing to teach."""

    def epoch(self, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from step `start`; the networks are in training mode."""

    def images(self, epoch: int, number: int) -> list[str]:
        """The files of this process's part of step `number` of `epoch`, both 0-based."""

    def schedule(self, epoch: int, number: int) -> dict[str, float]:
        """The numbers of step `number` of `epoch`, both 0-based, beside its learning rate."""

    def step(self, batch: Any) -> Terms:
        """Train on a batch with the numbers in the state: its detached 0-dim terms."""

    def evaluate(self) -> dict[str, float]:
        """Percent, by name, of all networks that are evaluated; {} where there is no set for it."""

    def close(self) -> None:
        """Ends the loaders."""
