"""What a reader of a log should be told: skipped steps, a loss that jumps, an accuracy gone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from .state import State

RECORDS = 20  # of the log, whose median is the usual loss
FEWEST = 5  # of them that make one
FACTOR = 4.0  # a loss so many times the usual one is a spike


def of_record(state: State, values: Mapping[str, float]) -> list[str]:
    """Notes on a log record: its skipped steps, a spike. Its loss joins those of the state."""
    loss, notes = values["loss"], []
    if skipped := int(values.get("skipped", 0)):
        row = state.meters.faults.last(state.meters.names)
        told = f"steps skipped until step {state.done}: {skipped}"
        notes.append(f"{told}, the last {row.in_words()}")
    if text := spike(state.losses, loss):
        notes.append(f"until step {state.done} {text}")
    if math.isfinite(loss):
        state.losses = [*state.losses, loss][-RECORDS:]
    return notes


def of_evaluation(state: State, score: str, chance: float) -> str | None:
    """A note on an evaluation, now the last one of the state's results, that is at chance level."""
    last, best = state.results["last"], state.results["best"]
    return fallen(f"epoch {last['epoch']:g}: {score}", last[score], best[score], chance)


def spike(before: Sequence[float], loss: float) -> str | None:
    """A note where the mean `loss` of a log record is a spike, and the one before it was none.

    `before` are those of the last RECORDS records, oldest first. Only losses above 0 have spikes.
    """
    if len(before) < FEWEST:
        return None
    usual = median(before)
    if usual <= 0 or not before[-1] <= FACTOR * usual < loss:
        return None
    return f"a spike: loss {loss:.4g}, {loss / usual:.3g} times its median {usual:.4g}"


def fallen(name: str, score: float, best: float, chance: float) -> str | None:
    """A note where an evaluation is at chance level after a better one; all in percent."""
    if not score <= chance < best:
        return None
    return f"{name} {score:.2f} is chance level, after {best:.2f}: look at the loss and optim.lr"
