"""What was read from the headers of many files once: kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

THREADS = 8  # header reads wait for the disk more than they compute


def fact(path: str, time: int, size: int) -> str:
    """What changes when a file does, so that what was learnt from it is learnt anew."""
    return f"{os.path.abspath(path)}\0{time}\0{size}"


def kept_under(kind: str, facts: list[str], suffix: str) -> Path:
    """The path for what follows from these facts: when one of them changes, so does the path."""
    name = hashlib.sha256(os.fsencode("\n".join(facts))).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdfuse"
    return folder / f"{kind}-{name}{suffix}"


def keep(path: Path, write: Callable[[IO[bytes]], None], what: str) -> None:
    """Written under another name and renamed: another process may read or write it now.

    A folder that cannot be written is a warning that names `what` is learnt anew each time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            write(file)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"{what} cannot be kept in {path.parent} ({error.strerror}), so every start reads all "
            "headers again; set XDG_CACHE_HOME to a folder that can be written",
            stacklevel=2,
        )
