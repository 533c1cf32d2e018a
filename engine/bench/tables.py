"""Records of several cases as tables, one for each run and way of running."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import rich.table
from rich.text import Text

from ...kernels.bench.report import Record, in_markdown

Grid = Sequence[Sequence[str]]


def grids(
    records: Sequence[Record],
    kind: str,
    shared: Sequence[str],
    cells: Callable[[Record], dict[str, str]],
) -> list[tuple[list[Record], Grid]]:
    """The records of each table and its lines, the headings first.

    A record with words of its own (`beside`) stands in the table of the one before it.

    Args:
        kind: of the records that are a line each.
        shared: what the cases of a table have in common.
        cells: a record's line, by its headings; a heading under which nothing stands is left out.
    """
    groups: dict[tuple, list[Record]] = {}
    run, key = 0, ()
    for record in records:
        run += record["kind"] == "facts"
        if record["kind"] == kind:
            if "beside" not in record or key[:1] != (run,):
                key = run, *(record[name] for name in shared)
            groups.setdefault(key, []).append(record)
    found: list[tuple[list[Record], Grid]] = []
    for group in groups.values():
        lines = [cells(record) for record in group]
        heads = list(dict.fromkeys(head for line in lines for head in line))
        heads = [h for h in heads if any(line.get(h, "-") != "-" for line in lines)]
        found.append((group, [heads, *([line.get(h, "-") for h in heads] for line in lines)]))
    return found


def shown(
    grids: Sequence[tuple[list[Record], Grid]],
    title: Callable[[list[Record]], str],
    markdown: bool,
) -> list[str | rich.table.Table]:
    """Titles, tables and why a case has no peer, in the order in which they are printed."""
    found: list[str | rich.table.Table] = []
    for group, grid in grids:
        found += [f"\n{title(group)}\n", drawn(grid, markdown)]
        notes = [f"{r['case']}: {r['peer_absent']}" for r in group if "peer_absent" in r]
        found += notes and ["", *dict.fromkeys(notes)]
    return found


def drawn(grid: Grid, markdown: bool, left: int = 1) -> str | rich.table.Table:
    """A grid as Markdown or for a terminal, there with `left` columns of words."""
    if markdown:
        return in_markdown(grid)
    heads, *body = grid
    table = rich.table.Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < left else "right", no_wrap=True)
    for line in body:
        table.add_row(*map(Text, line))
    return table
