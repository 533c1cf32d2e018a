"""A run as others see it while it trains: its log as it grows, and who holds its folder."""

from __future__ import annotations

import calendar
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from . import lease
from .log import NAME
from .records import parse


class Growth:
    """The records of a log.jsonl, each given once it is whole."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.records: list[dict[str, Any]] = []  # all that stand
        self._file: BinaryIO | None = None  # held open, its number is no other file's
        self._rest = b""  # of a line that is not whole yet

    def read(self) -> int | None:
        """Take in what was written since; how many of the earlier records still stand where the
        log was written anew, as a run does that goes on from a checkpoint, else None.

        Raises ValueError naming the line of what is no record.
        """
        before = self.records
        anew = self._open()
        if self._file is not None:
            *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
            for line in filter(None, lines):
                try:
                    self.records.append(parse(line))
                except ValueError as error:
                    number = len(self.records) + 1
                    raise ValueError(f"{self.path} line {number} is no record: {error}") from error
        if not anew:
            return None
        pairs = list(zip(before, self.records, strict=False))
        return next((i for i, (was, now) in enumerate(pairs) if was != now), len(pairs))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> bool:
        """Have the file open that is there now; whether it is another than it was."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        if self._file is not None:
            own = os.fstat(self._file.fileno())
            if (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino):
                return False
            self._file.close()
        anew = self._file is not None
        self._file, self._rest, self.records = self.path.open("rb"), b"", []
        return anew


class Holder:
    """Who trains in a run's folder; it is asked about once every lease.PAUSE seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: lease.Found | None = None
        self._still = 0  # looks in which the lease of another machine was the same

    def look(self) -> str:
        """ "alive", "dead", or "nobody"."""
        before, self._found = self._found, lease.holder(self._folder)
        if self._found is None:
            return "nobody"
        if (lives := self._found.lives) is not None:
            return "alive" if lives else "dead"
        self._still = self._still + 1 if self._found == before else 0
        return "alive" if self._still < lease.LOOKS else "dead"

    @property
    def owner(self) -> str:
        """The process that was found last, in words."""
        return "" if self._found is None else self._found.owner

    @property
    def since(self) -> float:
        """When it began, seconds since 1970; 0 where that is not known."""
        said = "" if self._found is None else str(self._found.facts.get("since"))
        try:
            return calendar.timegm(time.strptime(said, lease.SINCE))
        except ValueError:
            return 0.0
