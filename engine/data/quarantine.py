"""Images that cannot be read: named, counted, replaced by a rule, and too many of them an error."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np

from .manifest import Manifest

SHOWN = 20  # files named in an error


class BadImagesError(RuntimeError):
    """More unreadable images than data.bad_images; the text names them."""


class Quarantine:
    """The unreadable rows of a manifest, found when it was made or since then.

    A bad row is replaced by the next readable row of its class, wrapping at the last. The rule
    knows nothing of when or by which process a row was found bad, so all come to the same images;
    a row that only some crops or some moments show as bad is told to the others, and saved.
    """

    def __init__(self, manifest: Manifest, limit: int, *, warn: bool) -> None:
        """`warn`: say which rows the manifest has as bad (one process of many should)."""
        self.manifest = manifest
        self.limit = limit
        self.bad: dict[int, str] = {}
        self.replacement = np.arange(len(manifest.target))  # (n,) row to take for each row
        for row, why in manifest.bad.items():
            self._put(row, why)
        self._check()
        if warn:
            for row in self.bad:
                self._warn(row)

    def add(self, row: int, why: str, *, warn: bool = True) -> None:
        """Take a row out of use, with a warning; BadImagesError when that is one too many.

        `warn`: say so (where all processes find the same rows, one should).
        """
        if row not in self.bad:
            self._put(row, why)
            self._check()
            if warn:
                self._warn(row)

    def found(self) -> dict[int, str]:
        """The rows found bad since the manifest was made, and why."""
        return {row: why for row, why in self.bad.items() if row not in self.manifest.bad}

    def take(self, found: Mapping[int, str]) -> None:
        """Take rows out of use that another process, or this run before, has found bad."""
        for row, why in found.items():
            self.add(row, why, warn=False)

    def _put(self, row: int, why: str) -> None:
        self.bad[row] = why
        label = self.manifest.target[row]
        rows = np.flatnonzero(self.manifest.target == label)
        readable = rows[[int(r) not in self.bad for r in rows]]
        if not len(readable):
            name = self.manifest.classes[label]
            raise BadImagesError(f"no readable image of class {name!r} is left:\n{self._list()}")
        after = np.searchsorted(readable, rows) % len(readable)
        self.replacement[rows] = readable[after]

    def _check(self) -> None:
        if len(self.bad) > self.limit:
            raise BadImagesError(
                f"{len(self.bad)} unreadable images, data.bad_images={self.limit} allows no more; "
                f"repair or remove them (`kdfuse data check DIR` lists all):\n{self._list()}"
            )

    def _list(self) -> str:
        lines = [f"{self.manifest.name(row)}: {why}" for row, why in self.bad.items()]
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        return "\n".join(lines[:SHOWN] + more)

    def _warn(self, row: int) -> None:
        taken = self.manifest.name(int(self.replacement[row]))
        warnings.warn(
            f"unreadable image {self.manifest.name(row)} ({self.bad[row]}); {taken} takes its "
            "place",
            stacklevel=4,
        )
