"""A program on a pseudo-terminal, and what its screen then shows."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])")


class Terminal:
    """Runs Python code on a terminal of so many columns; `seen` is all that it wrote."""

    def __init__(self, columns, code, *words, **environment):
        self.parent, child = pty.openpty()
        self.resize(columns)
        modes = termios.tcgetattr(child)
        modes[3] &= ~termios.ECHO  # what is typed is no part of what is seen
        termios.tcsetattr(child, termios.TCSANOW, modes)
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        inherited |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            stdin=child,
            stdout=child,
            stderr=child,
            env=inherited | environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is then for it
        )
        os.close(child)
        self.seen = ""

    def resize(self, columns):
        fcntl.ioctl(self.parent, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, text):
        os.write(self.parent, text.encode())

    def until(self, text=None):
        """Read until it wrote this, or ended; what it wrote from then on."""
        start = len(self.seen)
        while text is None or text not in self.seen[start:]:
            try:
                self.seen += os.read(self.parent, 1 << 16).decode()
            except OSError:  # it has ended
                assert text is None, f"no {text!r} in {self.seen[start:]!r}"
                break
        return self.seen[start:]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.parent)


def screen(seen, columns):
    """The rows that a terminal shows, and whether its cursor is to be seen. ValueError for a code
    that no such terminal would get."""
    rows, at, column, cursor = [""], 0, 0, True
    while seen:
        if code := CODE.match(seen):
            seen = seen[code.end() :]
            what = code[1] + code[2]
            if what == "2K":
                rows[at] = ""
            elif code[2] == "A":
                at -= int(code[1] or 1)
            elif what in ("?25l", "?25h"):
                cursor = what == "?25h"
            elif code[2] != "m":
                raise ValueError(what)
            continue
        letter, seen = seen[0], seen[1:]
        if letter == "\r":
            column = 0
            continue
        if letter == "\n" or column == columns:
            at += 1
            column = 0 if letter != "\n" else column
            if at == len(rows):
                rows.append("")
        if letter != "\n":
            rows[at] = rows[at][:column].ljust(column) + letter + rows[at][column + 1 :]
            column += 1
    return [row.rstrip() for row in rows], cursor
