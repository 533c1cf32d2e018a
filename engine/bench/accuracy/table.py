"""The records of both loops as tables: one for each run and recipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ....kernels.bench.report import Record
from .. import tables
from ..cache.table import SHARED, title


def cells(record: Record) -> dict[str, str]:
    """A record's line, by its columns' headings."""
    spread = record["deviation"]
    return {
        "loop": record["side"],
        "top-1": f"{record['mean']:.2f}" + ("" if spread is None else f" +- {spread:.2f}"),
        "seeds": str(len(record["top1"])),
        "a run, s": f"{record['median_s']:,.0f}",
    }


def shown(records: Sequence[Record], markdown: bool) -> list[str | Table]:
    """What is printed of the records."""
    return tables.shown(tables.grids(records, "accuracy", SHARED, cells), title, markdown)
