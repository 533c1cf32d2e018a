"""The records of a benchmark, read back from the files that it has written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...kernels.bench.report import Record, each


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
