"""What people see of a run as it trains, by the records of its log.

On a terminal a line that stays in its place, and above it a table that gets a row an epoch;
elsewhere a line an epoch. Notes are shown as they come.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from .disk import FULL
from .standing import ASIDE, FRAME, Standing, number

NARROWEST = 8  # characters of a column


class Display:
    """One run, from its first record on or from a later one."""

    def __init__(self, since: float = 0.0) -> None:
        """`since`: see Standing."""
        self.standing = Standing(since)
        self._columns: dict[str, int] = {}  # of the table: widths, the most telling first
        self._head = ""  # that stands above the last row
        self._live: Live | None = None
        self._console = terminal()
        if self._console is not None:
            self._live = live(self, self._console)

    def show(self, record: Mapping[str, Any]) -> None:
        """Take a record of the log, and show what is to be seen of it."""
        self.standing.add(record)
        if record["kind"] == "epoch":
            self._row(self.standing.row)
        elif record["kind"] == "note":
            self.tell(record["text"])
        elif record["kind"] == "end":
            values = [f"{name} {number(v)}" for name, v in record.items() if name not in FRAME]
            self.tell("  ".join(["finished", *values]))

    def say(self, text: str) -> None:
        """Show what goes on until the next record."""
        self.standing.doing = text
        if self._live is None:
            self.tell(text)

    def tell(self, text: str, style: str = "") -> None:
        """Show a text, to stay."""
        if self._console is not None:
            self._console.print(text, style=style, markup=False, soft_wrap=True)
            return
        try:
            print(text, flush=True)
        except OSError as error:
            if error.errno not in FULL:  # of a file on a full disk: there is nobody to tell
                raise

    def close(self) -> None:
        """Leave the terminal as it was found, with the last line of a run that did not end."""
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        if 0 < self.standing.step and not self.standing.ended:
            self.tell(self.standing.line(self._width()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The line; by Live's thread, too."""
        yield Text(self.standing.line(self._width(), time.time()), no_wrap=True)

    def _width(self) -> int:
        assert self._console is not None
        return self._console.width - 1  # a terminal may wrap a line that is full

    def _row(self, row: dict[str, str]) -> None:
        if self._console is None:
            shown = {name: text for name, text in row.items() if not name.startswith(ASIDE)}
            self.tell("  ".join(f"{name} {text}" for name, text in shown.items()))
            return
        was = self._columns
        widest = {n: max(was.get(n, NARROWEST), len(n), len(text)) for n, text in row.items()}
        self._columns = widest | was | widest if was.keys() - widest.keys() else widest
        head = cells = ""
        for name, width in self._columns.items():
            if head and len(head) + 2 + width > self._width():
                break
            gap = "  " if head else ""
            head += f"{gap}{name:>{width}}"
            cells += f"{gap}{row.get(name, ''):>{width}}"
        if head != self._head:
            self.tell(head, style="bold")
            self._head = head
        self.tell(cells)


def terminal() -> Console | None:
    """The terminal that standard output is, where it can do more than print."""
    console = Console(highlight=False)
    return console if sys.stdout.isatty() and console.is_interactive else None


def live(shown: Any, console: Console) -> Live:
    """Keeps `shown` at the bottom of a terminal, as it is twice a second, until `stop`."""
    found = Live(shown, console=console, refresh_per_second=2, transient=True)
    found.start()
    console.show_cursor(True)  # who is killed, by a second Ctrl-C too, could not bring it back
    return found
