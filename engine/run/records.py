"""What the records of a log may be, and whether some are missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("start", "step", "epoch", "note", "end")
LARGE = 1e300


def parse(line: bytes) -> dict[str, Any]:
    """The record of a line. ValueError for what is none."""
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    check(record)
    return record


def check(record: Any) -> None:
    """Raise ValueError for what no RunLog writes and no reader expects."""
    if not isinstance(record, dict) or record.get("kind") not in KINDS:
        raise ValueError(f"it has no kind of {', '.join(KINDS)}")
    kind = record["kind"]
    told = ("time",) if kind in ("start", "note") else record.keys() - {"kind"}
    for name in dict.fromkeys(("step", "epoch", *sorted(told))):
        value: Any = record.get(name)
        if value is None and name not in ("step", "epoch"):
            continue  # it was not finite
        if type(value) not in (int, float) or not -LARGE < value < LARGE:
            raise ValueError(f"{name} is {str(value)[:20]}, wants a number")
    if kind == "note" and not isinstance(record.get("text"), str):
        raise ValueError("a note without text")


def gap(records: Sequence[Mapping[str, Any]], done: int, epoch_steps: int) -> str:
    """A note where a log lacks the end of the last whole epoch of `done` finished steps, or ""."""
    last = max((record["step"] for record in records if record["kind"] != "note"), default=0)
    if last >= done // epoch_steps * epoch_steps:
        return ""
    return f"the log has lost its records of steps {last + 1} to {done}"
