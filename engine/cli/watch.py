"""The verb kdfuse watch: runs as they train, seen from elsewhere."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ..run.display import Display, live, terminal
from ..run.folder import ENVIRONMENT, RECIPE, occupied
from ..run.follow import Growth, Holder
from ..run.lease import PAUSE
from ..run.standing import Standing

FINISHED = "finished"
QUIET = 60  # looks without a run at work after which a set is taken to be over


def watch(given: list[Path]) -> bool:
    """Show runs until they have ended, those in the folder of a set until no run there has been at
    work for a minute, for a set may be between two: whether all are finished. A run that is not
    there yet is waited for.

    Raises FileNotFoundError for what holds something and no run, ValueError for a log that is
    damaged.
    """
    sets = [path for path in given if _is_set(path)]
    view = Rows() if sets or len(given) > 1 else Display()
    shown: dict[Path, Watched] = {}
    quiet = 0
    with closing(view):
        while True:
            for path in given:
                for run in _runs_in(path) if path in sets else [path]:
                    if run not in shown:
                        own = view.add(str(run)) if isinstance(view, Rows) else view
                        shown[run] = Watched(run, own)
            for one in shown.values():
                one.look()
            quiet = quiet + 1 if all(one.why for one in shown.values()) else 0
            if quiet > (QUIET if sets else 0):
                return all(one.why == FINISHED for one in shown.values())
            time.sleep(PAUSE)


class Watched:
    """One run: what its log and its folder say, shown on `display`."""

    def __init__(self, folder: Path, display: Display | Row) -> None:
        self.folder, self.display = folder, display
        self.why = ""  # it does not go on
        self._log, self._holder = Growth(folder), Holder(folder)
        self._shown = 0  # records
        self._state = ""

    def look(self) -> None:
        """Show what is new."""
        held = self._holder.look()  # before the log, which has all once nobody holds it
        if (kept := self._log.read()) is not None:
            self._rewind(min(kept, self._shown))
        elif not self._shown:
            self.display.standing = Standing(self._holder.since)
        if held == "alive":
            self._tell(f"running: {self._holder.owner}")
        for record in self._log.records[self._shown :]:
            self.display.show(record)
        self._shown = len(self._log.records)
        self.why = self._why(held)
        if self.why not in ("", FINISHED):
            self._tell(self.why)
        elif held == "nobody" and not self.why:
            self._tell(f"waiting for {self.folder} to begin; Ctrl-C ends it")

    def _why(self, held: str) -> str:
        """Why it does not go on, and how it would; "" where it does, or has not begun."""
        if self.display.standing.ended:
            return FINISHED
        if held == "dead":
            return f"killed, {self._holder.owner}; {self._resume()}"
        if held == "nobody" and (self.folder / RECIPE).exists():
            return f"stopped at step {self.display.standing.step}; {self._resume()}"
        return ""

    def _rewind(self, kept: int) -> None:
        """Another log stands, with the first so many of the records that were shown."""
        self.display.standing = Standing(self._holder.since)
        for record in self._log.records[:kept]:
            self.display.standing.add(record)
        self._shown = kept
        self._tell(f"resumed from step {self.display.standing.step}")

    def _tell(self, state: str) -> None:
        if state != self._state:
            self._state = state
            self.display.tell(state)

    def _resume(self) -> str:
        """How it goes on: the command that began it, once more."""
        try:
            facts = json.loads((self.folder / ENVIRONMENT).read_bytes())
            program, verb, *words = map(str, facts["command"])
        except (OSError, ValueError, LookupError, TypeError):
            program = verb = ""
        if Path(program).name != "kdfuse" or verb != "train":
            return "resume=True in the call that began it goes on"
        words = [word for word in words if not word.startswith("resume=")]
        return f"resume with: {shlex.join(['kdfuse', verb, *words, 'resume=true'])}"


class Rows:
    """Several runs: on a terminal a line each, elsewhere their epochs and notes by name."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._console = terminal()
        self._live = None if self._console is None else live(self, self._console)

    def add(self, name: str) -> Row:
        """A row for one more run."""
        self._rows.append(Row(name, printed=self._live is None))
        return self._rows[-1]

    def close(self) -> None:
        """Leave the lines as they are."""
        if self._live is not None:
            self._live.transient = False
            self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for row in list(self._rows):
            yield Text(row.line(console.width - 1), no_wrap=True)


class Row:
    """A run of several; what is said to it is as what is said to Display."""

    def __init__(self, name: str, printed: bool) -> None:
        self.standing = Standing()
        self._name, self._printed = name, printed
        self._state = ""

    def show(self, record: Mapping[str, Any]) -> None:
        """Take a record of the log."""
        self.standing.add(record)
        if record["kind"] == "epoch":
            self._print("  ".join(f"{name} {text}" for name, text in self.standing.row.items()))
        elif record["kind"] == "note":
            self._print(record["text"])
        elif record["kind"] == "end":
            self.tell(FINISHED)

    def tell(self, text: str) -> None:
        """Take down its state."""
        self._state = text
        self._print(text)

    def line(self, width: int) -> str:
        """Its name, its state where it does not run, and where it stands."""
        goes_on = self._state.startswith("running")
        known = [self._name] if goes_on else [self._name, self._state.partition(";")[0]]
        start = "  ".join([*known, ""])
        return start[:width] + self.standing.line(
            max(width - len(start), 0), time.time() if goes_on else None
        )

    def _print(self, text: str) -> None:
        if self._printed:
            print(f"{self._name}: {text}", flush=True)


def _is_set(path: Path) -> bool:
    """Whether runs are in the folder, and it is none itself."""
    if path.is_file():
        raise FileNotFoundError(f"{path} is not a run directory: it is a file")
    if (path / RECIPE).exists() or not occupied(path):
        return False
    if not _runs_in(path):
        raise FileNotFoundError(f"{path} is not a run directory: it has no {RECIPE}")
    return True


def _runs_in(folder: Path) -> list[Path]:
    return [path.parent for path in sorted(folder.glob(f"*/{RECIPE}"))]
