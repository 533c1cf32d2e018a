"""Sizes of all images of a split, read from the headers once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .images import UnreadableError, inspect

THREADS = 8  # header reads wait for the disk more than they compute
Sizes = NDArray[np.int32]


def read_sizes(stats: list[tuple[str, int, int]]) -> tuple[Sizes, dict[int, str]]:
    """Sizes (n, 2) as height, width, and the unreadable rows with the reason (their size is 0, 0).

    `stats`: path, modification time in nanoseconds and length of each file. The sizes are kept
    under a name made of these, so a changed file is read anew. Unreadable files are tried again
    each time: the cause may have been the disk or the rights.
    """
    facts = "\n".join(f"{os.path.abspath(path)}\0{time}\0{size}" for path, time, size in stats)
    name = hashlib.sha256(os.fsencode(facts)).hexdigest()
    kept = _folder() / f"headers-1-{name}.npy"
    sizes = _load(kept, len(stats))
    missing = np.flatnonzero(sizes[:, 0] == 0).tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(_inspect, [stats[row][0] for row in missing]))
    bad = {}
    for row, result in zip(missing, results, strict=True):
        if isinstance(result, str):
            bad[row] = result
        else:
            sizes[row] = result
    if len(bad) < len(missing):
        _save(kept, sizes)
    return sizes, bad


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdfuse"


def _inspect(path: str) -> tuple[int, int] | str:
    try:
        return inspect(path)
    except UnreadableError as error:
        return str(error)


def _load(path: Path, n: int) -> Sizes:
    """The sizes kept, 0 where there are none."""
    try:
        sizes = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not there, or torn: read the headers again
        return np.zeros((n, 2), np.int32)
    return sizes if sizes.shape == (n, 2) else np.zeros((n, 2), np.int32)


def _save(path: Path, sizes: Sizes) -> None:
    """Written under another name and renamed: another process may read or write it now."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.save(file, sizes)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"image sizes cannot be kept in {path.parent} ({error.strerror}), so every start reads "
            "all headers again; set XDG_CACHE_HOME to a folder that can be written",
            stacklevel=2,
        )
