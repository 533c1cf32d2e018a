"""The record of a run: log.jsonl for programs, and what people see of it (display.py).

A record is one JSON object a line: {"kind", "step", "epoch", "time", ...}. `kind` is start, step,
epoch, note or end; `step` counts finished steps, `epoch` finished epochs (fractional within one).
"time" (seconds since 1970), "images_per_s" and "data_wait" are measured by the clock; all else is
the same in a run and in its twin that was killed and resumed.

On a full disk a run neither begins nor is finished: OSError says what cannot be written. Between
its first and its last record it goes on, says so once, and writes what waits as soon as it can.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..recipe.load import AnyRecipe
from .disk import Growing, write_whole
from .display import Display
from .folder import plain
from .records import gap, parse
from .trackers import opened
from .trackers.remote import TrackerError

NAME = "log.jsonl"
LATER = "the run goes on, and what the file lacks is written as soon as there is room"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line that a killed run left unfinished is dropped.

    Raises ValueError naming the line of any other text that is no record.
    """
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(parse(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path} line {number} is no record: {error}; remove that line"
            ) from error
    return records


class RunLog:
    """Writes and shows the progress of one run. Processes other than rank 0 stay silent."""

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        epochs: int,
        *,
        resume_step: int | None = None,
        rank: int = 0,
        facts: Mapping[str, Any] | None = None,
        recipe: AnyRecipe | None = None,
    ) -> None:
        """Open run_dir/log.jsonl, and the trackers that the recipe asks for.

        `resume_step` None starts a new log, whose first record holds `facts`; a number keeps an
        existing one up to that step and drops what came later. Raises FileExistsError when a new
        log would overwrite one, OSError for one that cannot be begun, and ValueError for a tracker
        that begins no run.
        """
        self.path = run_dir / NAME
        self.total_steps, self.epochs = total_steps, epochs
        self.position = resume_step or 0  # finished steps
        self.silent = rank != 0
        self._finished = False
        self._notes: set[str] = set()
        self._failed: set[str] = set()  # files that could not be written, and the user knows
        if self.silent:
            return
        kept = self._kept(resume_step)
        self._file = Growing(self.path)
        facts = {"steps": total_steps, "epochs": epochs, **(facts or {})}
        begun = self._record("start", 0, 0.0, facts)
        if not kept:
            try:
                self._write(begun)
            except OSError:
                self._file.close()
                raise
        names, config = (None, {}) if recipe is None else (recipe.run.trackers, plain(recipe))
        purge = None if resume_step is None else resume_step + 1
        try:
            self._trackers, missing = opened(names, run_dir, purge, config)
        except (ValueError, OSError):
            self._file.close()
            raise
        self._display = Display()
        self._display.show(begun | {"step": self.position, "epoch": self._epoch()})
        if lost := gap(kept, self.position, total_steps // epochs):
            self.note(lost)
        for text in missing:
            self.note(text)

    def _kept(self, resume_step: int | None) -> list[dict[str, Any]]:
        """The records that stay, after cutting the file down to them."""
        if not self.path.exists():
            return []
        if resume_step is None:
            raise FileExistsError(f"{self.path} exists: resume that run or choose another folder")
        kept = [r for r in read(self.path) if r["step"] <= resume_step and r["kind"] != "end"]
        self._notes = {r["text"] for r in kept if r["kind"] == "note"}
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def step(
        self,
        step: int,
        epoch: float,
        values: Mapping[str, float],
        images_per_s: float,
        data_wait: float,
    ) -> None:
        """Record means since the last call; `data_wait` is the share (0..1) of idle time."""
        self.position = step
        if self.silent:
            return
        clock = {"images_per_s": images_per_s, "data_wait": data_wait}
        self._add("step", step, epoch, {**values, **clock})

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Record the evaluation after `epoch` finished epochs: top1, top5, slt0_top1, lr, ...

        Of means over the epoch's training batches (train_loss, ...) the loss alone is shown.
        """
        step = round(epoch * self.total_steps / self.epochs)
        self.position = step
        if not self.silent:
            self._add("epoch", step, float(epoch), values)

    def note(self, text: str, step: int | None = None) -> None:
        """Say something that a reader of the run should know; the same text is recorded once.

        `step`: finished steps, where there are more than the last record says.
        """
        if self.silent:
            return
        self.position = self.position if step is None else step
        if text in self._notes:
            self._display.tell(text)
            return
        self._notes.add(text)
        self._add("note", self.position, self._epoch(), {"text": text})

    def say(self, text: str) -> None:
        """Show what goes on; it is not recorded."""
        if not self.silent:
            self._display.say(text)

    def end(self, values: Mapping[str, float]) -> None:
        """Record the results of a finished run. OSError where that cannot be written."""
        if not self.silent:
            self._add("end", self.position, self._epoch(), values)
            self._finished = True

    def close(self) -> None:
        """Close the files; an unfinished run gets no end record."""
        if self.silent:
            return
        self._file.close()
        self._display.close()
        for tracker in self._trackers:  # behind the display: they print what they have to say
            if text := tracker.close(self._finished):
                self._display.tell(text)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # else what ended the run is what has to be told
                raise

    def _epoch(self) -> float:
        return self.position * self.epochs / self.total_steps

    def _record(
        self, kind: str, step: int, epoch: float, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        frame = {"kind": kind, "step": step, "epoch": epoch, "time": round(time.time(), 3)}
        return frame | {name: _finite(value) for name, value in values.items()}

    def _add(self, kind: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        record = self._record(kind, step, epoch, values)
        self._write(record)
        for tracker in self._trackers if kind in ("step", "epoch") else ():
            try:
                tracker.add(step, {f"{kind}/{name}": v for name, v in values.items()})
            except OSError as error:
                self._cannot_write(error)
            except TrackerError as error:
                self.note(str(error))
        self._display.show(record)

    def _write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        except OSError as error:
            if record["kind"] in ("start", "end"):
                raise
            self._cannot_write(error)

    def _cannot_write(self, error: OSError) -> None:
        if error.filename not in self._failed:
            self._failed.add(error.filename)
            self._display.tell(f"cannot write {error.filename}: {error.strerror}; {LATER}")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
