"""Sizes of all images of a split, read from the headers once and kept in the user's cache."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..images import Opener, UnreadableError, inspect, opener_of
from .header_cache import THREADS, fact, keep, kept, kept_under

Sizes = NDArray[np.int32]


def read_sizes(stats: list[tuple[str, int, int]]) -> tuple[Sizes, dict[int, str]]:
    """`sizes_of` files; `stats`: path, modification time in nanoseconds and length of each."""
    openers = [opener_of(path) for path, _, _ in stats]
    return sizes_of([fact(*stat) for stat in stats], openers)


def sizes_of(facts: list[str], openers: Sequence[Opener]) -> tuple[Sizes, dict[int, str]]:
    """Sizes (n, 2) as height, width, and the unreadable rows with the reason (their size is 0, 0).

    The sizes are kept under a name made of the facts, one for each image, so a changed image is
    read anew. Unreadable images are tried again each time: the cause may have been the disk or the
    rights.
    """
    place = kept_under("headers-2", facts)
    known = kept(place)
    sizes = np.zeros((len(facts), 2), np.int32)
    if known is not None:
        sizes = np.frombuffer(known, np.int32).reshape(sizes.shape).copy()
    missing = np.flatnonzero(sizes[:, 0] == 0).tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(_inspect, [openers[row] for row in missing]))
    bad = {}
    for row, result in zip(missing, results, strict=True):
        if isinstance(result, str):
            bad[row] = result
        else:
            sizes[row] = result
    if len(bad) < len(missing):
        keep(place, sizes.tobytes(), "image sizes")
    return sizes, bad


def _inspect(opener: Opener) -> tuple[int, int] | str:
    try:
        return inspect(opener)
    except UnreadableError as error:
        return str(error)
