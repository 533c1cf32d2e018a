"""The records of recorded teachers as tables: one for each run and recipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ....kernels.bench.report import Record, number
from .. import tables

SHARED = ("recipe", "method", "student", "teacher", "device", "epochs", "batch")


def cells(record: Record) -> dict[str, str]:
    """A record's line, by its columns' headings."""

    def get(name: str, form: str) -> str:
        return number(record.get(name), form)

    spread = record["deviation"]
    return {
        "teacher": record["side"],
        "bytes a view": get("view_bytes", ",d"),
        "views": get("views", "d"),
        "bytes an image": get("image_bytes", ",d"),
        "top-1": f"{record['mean']:.2f}" + ("" if spread is None else f" +- {spread:.2f}"),
        "seeds": str(len(record["top1"])),
        "images/s": get("images_per_s", ",.0f"),
    }


def title(group: Sequence[Record]) -> str:
    """What the sides of a table share."""
    record = group[0]
    found = f"{record['recipe']}: {record['method']}, {record['teacher']} -> {record['student']}, "
    return found + f"{record['epochs']} epochs of batches of {record['batch']}, {record['device']}"


def shown(records: Sequence[Record], markdown: bool) -> list[str | Table]:
    """What is printed of the records."""
    return tables.shown(tables.grids(records, "cache", SHARED, cells), title, markdown)
