"""Files that are whole or not there, whenever the process or the power ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, aside: Path) -> Iterator[BinaryIO]:
    """A file to write into, which becomes `path` when the block ends, and vanishes if it raises.

    `aside` is its name until then, on the same file system. OSError names the file.
    """
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # so it is of a write
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Make the names in `folder` durable; without it a power cut can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
