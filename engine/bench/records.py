"""The records of a benchmark, read back from the files that it has written."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ...kernels.bench.report import Record


def read(paths: Sequence[Path], kind: str, verb: str) -> list[Record]:
    """All records of these files; a line that was cut off is left out, and said.

    Raises ValueError for a line that is no record, and where none is of this kind.
    """
    found: list[Record] = []
    for path in paths:
        for number, line in enumerate(path.read_text().split("\n"), 1):
            if not line:
                continue
            try:
                record = json.loads(line)
            except ValueError:
                print(f"{path}:{number} was cut off; it is left out", file=sys.stderr)
                continue
            if not isinstance(record, dict) or "kind" not in record:
                raise ValueError(f"--from {path}: line {number} is not a record of a benchmark")
            found.append(record)
    if not any(record["kind"] == kind for record in found):
        raise ValueError(
            f"--from {' '.join(map(str, paths))}: holds no record of kdfuse bench {verb}; "
            "--out FILE writes them"
        )
    return found
