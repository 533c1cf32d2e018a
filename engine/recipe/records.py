"""What does not fit around recorded self-learning teachers: run.record and slt.record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .load import Recipe


def of_records(recipe: Recipe) -> Iterator[str]:
    """One line for each problem, with the key, the reason and the cure."""
    for name, also in recipe.also.items():
        if also.slt is not None and also.slt.record is not None:
            yield (
                f"also.{name}.slt.record: a run learns from one record, its own student's; leave "
                "it out"
            )
    if recipe.run.record is not None:
        yield from _of_recording(recipe)
    if recipe.slt is not None and recipe.slt.record is not None:
        yield from _of_replay(recipe)


def _of_recording(recipe: Recipe) -> Iterator[str]:
    yield from _of_method("run.record", recipe)
    if recipe.slt is not None and recipe.slt.record is not None:
        yield "run.record: slt.record has the answers already; leave one of them out"
    if others := [name for name, also in recipe.also.items() if also.method.slt_count]:
        yield (
            f"run.record: also.{others[0]} has SL-Ts of its own, and a record holds those of one "
            "method; train it in another run"
        )
    if recipe.run.capture:
        yield "run.record: a captured step hands nothing to the host; set run.capture=false"
    of_runs = "run.record, which holds the run's own epochs, SL-Ts and temperature"
    yield from recipe.cache.unused(of_runs, "cache", "views", "teachers", "temperature", "taps")
    if recipe.cache.label:
        yield "cache.label: KD from the fused SL-Ts treats no label apart; leave it out"
    if recipe.cache.rest == "bucket":
        yield "cache.rest: bucket is for a teacher's cache and method kd; set it to spread or drop"


def _of_replay(recipe: Recipe) -> Iterator[str]:
    yield from _of_method("slt.record", recipe)


def _of_method(key: str, recipe: Recipe) -> Iterator[str]:
    """What a method has to be for its SL-Ts to be recorded, or to learn from such a record."""
    method = recipe.method
    if method.name != "slkd":
        yield f"{key}: only the SL-Ts of method slkd are recorded, not those of {method.name}"
        return
    if getattr(method, "teachers", None) == "teacher":
        yield (
            f"{key}: with method.teachers=teacher the student does not learn from SL-Ts; set "
            "method.teachers=both, or slts"
        )
    elif not getattr(method, "detach_slts", True):
        yield (
            f"{key}: with method.detach_slts=false the student's loss shapes the SL-Ts, so that "
            "what they say is for this student alone; set method.detach_slts=true"
        )
