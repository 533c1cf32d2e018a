"""Where a run stands, by the records of its log: the line and the rows that people see of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

CLOCK = ("images_per_s", "data_wait")
FRAME = ("kind", "step", "epoch", "time")
# Of the names of an evaluation's values: what its networks are judged by, and what only a wide
# terminal has room for.
SCORES = ("top1", "ap")
ASIDE = ("kl_", "softened_kl_", "entropy_", "agreement_")


class Standing:
    """Takes the records of a log in their order; `line` may be asked by another thread."""

    def __init__(self, since: float = 0.0) -> None:
        """`since`: when whoever trains now began; what came before says nothing of its pace."""
        self.steps = self.epochs = 0  # of the whole run; 0: not known yet
        self.step, self.epoch = 0, 0.0
        self.ended = False
        self.doing = ""  # since the last record
        self.row: dict[str, str] = {}  # the last epoch in words, the most telling first
        self._since = since
        self._values: dict[str, float | None] = {}  # of the last step record
        self._time = 0.0  # of the last record
        self._pace: float | None = None  # seconds of a step, with what comes between steps
        self._marks: deque[tuple[int, float]] = deque()  # step and time, over an epoch at least
        self._images: tuple[int, float, float] | None = None  # steps of the epoch, time, waiting

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the next record."""
        kind, step = record["kind"], record["step"]
        if kind == "start":
            self.steps, self.epochs = record.get("steps", 0), record.get("epochs", 0)
        if kind == "step":
            self._values = {name: v for name, v in record.items() if name not in FRAME}
            self._count(step - self.step, record.get("images_per_s"), record.get("data_wait"))
        if kind in ("step", "epoch"):
            self._mark(step, record.get("time") or 0.0)
        self.step, self.epoch, self.doing = step, record["epoch"], ""
        self._time, self.ended = record.get("time") or 0.0, kind == "end"
        if kind == "epoch":
            self.row, self._images = self._in_words(record), None

    def line(self, width: int, now: float | None = None) -> str:
        """The run in at most `width` characters: as many parts as there is room for. With `now`,
        seconds since 1970, it goes on, and the time that is left is among them."""
        parts = [f"epoch {self.epoch:.2f}/{self.epochs}"] if self.epochs else []
        if self.doing:
            parts.append(self.doing)
        values = dict(self._values)
        if "loss" in values:
            parts.append(f"loss {number(values.pop('loss'))}")
        speed, waiting = (values.pop(name, None) for name in CLOCK)
        if speed is not None:
            parts.append(f"{speed:,.0f} img/s")
        if now is not None and (left := self.left(now)) is not None:
            parts.append(f"ETA {duration(left)}")
        if waiting is not None:
            parts.append(f"data wait {100 * waiting:.0f}%")
        if self.steps:
            parts.append(f"step {self.step}/{self.steps}")
        parts += [f"{name} {number(value)}" for name, value in values.items()]
        found = ""
        for part in parts:
            longer = f"{found}  {part}" if found else part
            if len(longer) > width:
                break
            found = longer
        return found or "  ".join(parts)[:width]

    def left(self, now: float) -> float | None:
        """Seconds until the run ends, None where nothing is known of them."""
        if self._pace is None or not self.steps:
            return None
        whole = self._pace * (self.steps - self.step)
        return min(max(whole - (now - self._time), 0.0), whole)

    def _in_words(self, record: Mapping[str, Any]) -> dict[str, str]:
        """An epoch's record, the most telling values first."""
        values = {name: number(v) for name, v in record.items() if name not in FRAME}
        row = {"epoch": f"{record['epoch']:g}/{self.epochs}"}
        if "train_loss" in values:
            row["loss"] = values["train_loss"]
        shown = {name: text for name, text in values.items() if not name.startswith("train_")}
        row |= {name: text for name, text in shown.items() if name.split("_")[-1] in SCORES}
        if self._images:
            steps, time, waited = self._images
            row |= {"img/s": f"{steps / time:,.0f}", "wait": f"{100 * waited / time:.0f}%"}
        if (left := self.left(self._time)) is not None:
            row["ETA"] = duration(left)
        row |= {name: text for name, text in shown.items() if not name.startswith(ASIDE)}
        return row | shown

    def _count(self, steps: int, speed: float | None, waiting: float | None) -> None:
        """Take the speed of some steps, for the mean of their epoch."""
        if speed:
            time = steps / speed  # of a batch of one image: only shares are asked for
            was = self._images or (0, 0.0, 0.0)
            self._images = (was[0] + steps, was[1] + time, was[2] + (waiting or 0.0) * time)

    def _mark(self, step: int, time: float) -> None:
        """Take down when a step was done. The pace is that of the last epoch or so: an evaluation
        is in it, and what training was like long ago is not."""
        if time < self._since or not self.epochs:
            return
        self._marks.append((step, time))
        while len(self._marks) > 2 and self._marks[1][0] <= step - self.steps // self.epochs:
            self._marks.popleft()
        first, began = self._marks[0]
        if step > first:
            self._pace = max(time - began, 0.0) / (step - first)


def number(value: float | None) -> str:
    """A record's value; one that was not finite is null there."""
    return "nan" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """2:03:04, or 3:04 of less than an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
