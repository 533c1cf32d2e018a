"""The record of a run: log.jsonl for programs, one line or a progress bar for people.

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
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .board import Board
from .disk import FULL, Growing, write_whole
from .records import check, gap

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
            record = json.loads(line)
            check(record)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path} line {number} is no record: {error}; remove that line"
            ) from error
        records.append(record)
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
    ) -> None:
        """Open run_dir/log.jsonl.

        `resume_step` None starts a new log, whose first record holds `facts`; a number keeps an
        existing one up to that step and drops what came later. Raises FileExistsError when a new
        log would overwrite one, and OSError for one that cannot be begun.
        """
        self.path = run_dir / NAME
        self.total_steps, self.epochs = total_steps, epochs
        self.position = resume_step or 0  # finished steps
        self.silent = rank != 0
        self._notes: set[str] = set()
        self._failed: set[str] = set()  # files that could not be written, and the user knows
        self._board: Board | None = None
        self._progress: Progress | None = None
        if self.silent:
            return
        kept = self._kept(resume_step)
        self._file = Growing(self.path)
        if not kept:
            try:
                facts = {"steps": total_steps, "epochs": epochs, **(facts or {})}
                self._write("start", 0, 0.0, facts)
            except OSError:
                self._file.close()
                raise
        self._progress = _progress(total_steps, self.position)
        if lost := gap(kept, self.position, total_steps // epochs):
            self.note(lost)
        try:
            purge = None if resume_step is None else resume_step + 1
            self._board = Board(run_dir / "tensorboard", purge)
        except ImportError:
            pass
        except OSError as error:
            self._cannot_write(error, "the run goes on without it")

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
        self._write("step", step, epoch, {**values, **clock})
        self._show(
            f"epoch {epoch:.2f}/{self.epochs}  step {step}/{self.total_steps}  "
            f"{images_per_s:,.0f} img/s  data wait {100 * data_wait:.0f}%  {_words(values)}",
            on_bar=True,
        )

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """Record the evaluation after `epoch` finished epochs: top1, top5, slt0_top1, lr, ...

        Means over the epoch's training batches (train_loss, ...) are recorded and not shown.
        """
        step = round(epoch * self.total_steps / self.epochs)
        self.position = step
        if self.silent:
            return
        self._write("epoch", step, float(epoch), values)
        shown = {name: value for name, value in values.items() if not name.startswith("train_")}
        self._show(f"epoch {epoch}/{self.epochs} done  {_words(shown)}")

    def note(self, text: str, step: int | None = None) -> None:
        """Say something that a reader of the run should know; the same text is recorded once.

        `step`: finished steps, where there are more than the last record says.
        """
        if self.silent:
            return
        self.position = self.position if step is None else step
        if text not in self._notes:
            self._notes.add(text)
            self._write("note", self.position, self._epoch(), {"text": text})
        self._show(text)

    def say(self, text: str) -> None:
        """Show what goes on; it is not recorded."""
        if not self.silent:
            self._show(text, on_bar=True)

    def end(self, values: Mapping[str, float]) -> None:
        """Record the results of a finished run. OSError where that cannot be written."""
        if self.silent:
            return
        self._write("end", self.position, self._epoch(), values)
        self._show(f"finished  {_words(values)}")

    def close(self) -> None:
        """Close the files; an unfinished run gets no end record."""
        if self.silent:
            return
        self._file.close()
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()

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

    def _write(self, kind: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        record = {"kind": kind, "step": step, "epoch": epoch, "time": round(time.time(), 3)}
        record |= {name: _finite(value) for name, value in values.items()}
        try:
            self._file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        except OSError as error:
            if kind in ("start", "end"):
                raise
            self._cannot_write(error)
        if self._board is not None and kind in ("step", "epoch"):
            try:
                self._board.add(step, {f"{kind}/{name}": v for name, v in values.items()})
            except OSError as error:
                self._cannot_write(error)

    def _cannot_write(self, error: OSError, then: str = LATER) -> None:
        if error.filename not in self._failed:
            self._failed.add(error.filename)
            self._show(f"cannot write {error.filename}: {error.strerror}; {then}")

    def _show(self, text: str, on_bar: bool = False) -> None:
        if self._progress is None:
            try:
                print(text, flush=True)
            except OSError as error:
                if error.errno not in FULL:  # of a file on a full disk: there is nobody to tell
                    raise
        elif on_bar:
            self._progress.update(self._progress.task_ids[0], completed=self.position, text=text)
        else:
            self._progress.console.print(text, highlight=False, markup=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _words(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _progress(total_steps: int, done: int) -> Progress | None:
    """A bar on a terminal; None elsewhere, where whole lines are printed."""
    if not sys.stdout.isatty():
        return None
    columns = (BarColumn(20), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    progress = Progress(*columns, console=Console())
    progress.add_task("train", total=total_steps, completed=done, text="")
    progress.start()
    return progress
