"""The records of a benchmark: kept as they come, and read back from the files that hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...kernels.bench.report import Record, append, each


def keeper(out: Path | None) -> tuple[list[Record], Callable[[Record], None]]:
    """A list of records, and what adds one to it and, at once, to the file `out`."""
    found: list[Record] = []

    def keep(record: Record) -> None:
        found.append(record)
        if out:
            append(out, record)

    return found, keep


def read(paths: Sequence[Path], kind: str, verb: str) -> list[Record]:
    """All records of these files.

    Raises ValueError for a line that is no record, and where none is of this kind.
    """
    found = [record for _, record in each(paths)]
    if not any(record["kind"] == kind for record in found):
        raise ValueError(
            f"--from {' '.join(map(str, paths))}: holds no record of kdfuse bench {verb}; "
            "--out FILE writes them"
        )
    return found
