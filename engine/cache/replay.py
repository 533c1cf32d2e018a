"""Answers of a teacher that a cache holds, for the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .header import Header, read
from .shards import CacheError, look, rows_of


class Recorded:
    """A whole cache, opened: every file is there and has its size."""

    key = "teacher.cache"  # the setting that names its folder
    of_slts = False
    unfinished = "the command that recorded it goes on with it"

    def __init__(self, folder: Path) -> None:
        """Raises CacheError for one that is not whole, or whose files are damaged."""
        self.folder = folder
        self.header: Header = read(folder)
        if self.of_slts != (self.header.slts is not None):
            of, other = ("a teacher", "teacher.cache") if self.of_slts else ("SL-Ts", "slt.record")
            raise CacheError(f"{self.key}: {folder} has the answers of {of}; give it as {other}")
        self.layout = self.header.layout()
        self.unreadable: dict[int, str] = {}  # rows of the training set, when it was recorded
        missing, places = 0, list(self.layout.shards())
        for view, steps in places:
            try:
                path = self.layout.path(folder, view, steps.start)
                self.unreadable |= look(path, self.layout, view, steps)["unreadable"]
            except FileNotFoundError:
                missing += 1
        if missing:
            raise CacheError(
                f"{self.key}: {folder} is not whole, {missing} of its {len(places)} files are "
                f"not there yet; {self.unfinished}"
            )

    def epoch(self, epoch: int) -> int:
        """The view, an epoch of the plan, that an epoch of a run sees."""
        return epoch % self.header.views

    def at(self, epoch: int, step: int, part: range) -> tuple[Tensor, ...]:
        """The answers to the images at these places of a step, as the form decodes them."""
        first = step - step % self.layout.length
        place = (step - first) * self.layout.batch
        path = self.layout.path(self.folder, self.epoch(epoch), first)
        rows = rows_of(path, self.layout, place + part.start, len(part))
        return self.header.form.decode(rows)

    def check_weights(self, digest: str | None) -> None:
        """Raise CacheError where a teacher comes with weights too, by this digest, and others."""
        if digest not in (None, self.header.digest):
            raise CacheError(
                f"teacher.checkpoint: not the weights of {self.folder} ({self.header.digest[:12]} "
                f"-> {str(digest)[:12]}); give those of the teacher that was recorded"
            )

    def check(self, now: Mapping[str, Any]) -> None:
        """Raise CacheError unless these, of Header's fields, are as they were recorded."""
        was, lines = self.header.key(), []
        for name, value in now.items():
            if isinstance(value, Mapping):
                own = was[name]
                both = sorted({*own, *value})
                lines += [
                    f"{name}.{key}: {own.get(key)} -> {value.get(key)}"
                    for key in both
                    if own.get(key) != value.get(key)
                ]
            elif was[name] != value:
                lines.append(f"{name}: {was[name]} -> {value}")
        if lines:
            raise CacheError(
                f"{self.key}: {self.folder} was recorded for other views (recorded -> asked "
                "for):\n  " + "\n  ".join(lines) + "\nundo that, or record it anew"
            )
