"""What was read from the headers of many files once: kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

THREADS = 8  # header reads wait for the disk more than they compute
DIGEST = hashlib.sha256().digest_size  # bytes


def fact(path: str, time: int, size: int) -> str:
    """What changes when a file does, so that what was learnt from it is learnt anew."""
    return f"{os.path.abspath(path)}\0{time}\0{size}"


def kept_under(kind: str, facts: list[str]) -> Path:
    """The path for what follows from these facts: when one of them changes, so does the path."""
    name = hashlib.sha256(os.fsencode("\n".join(facts))).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdfuse"
    return folder / f"{kind}-{name}"


def keep(path: Path, data: bytes, what: str) -> None:
    """Written under another name and renamed: another process may read or write it now.

    A folder that cannot be written is a warning that names `what` is learnt anew each time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(hashlib.sha256(data).digest())
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"{what} cannot be kept in {path.parent} ({error.strerror}), so every start reads all "
            "headers again; set XDG_CACHE_HOME to a folder that can be written",
            stacklevel=2,
        )


def kept(path: Path) -> bytes | None:
    """What `keep` put there; None where nothing is, or something else: learn it anew."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    data = raw[DIGEST:]
    return data if hashlib.sha256(data).digest() == raw[:DIGEST] else None
