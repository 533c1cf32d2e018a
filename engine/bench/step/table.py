"""The records of steps as tables: one for each run and way of running."""

from __future__ import annotations

from collections.abc import Sequence

import rich.table
from rich.text import Text

from ....kernels.bench import report
from ....kernels.bench.report import Record, number

# What a table's cases share.
SHARED = ("recipe", "device", "batch", "size", "amp", "compile", "channels_last")


def cells(record: Record) -> dict[str, str]:
    """A record's line, by its columns' headings."""

    def get(name: str, form: str) -> str:
        return number(record.get(name), form)

    low, high = get("images_per_s_p20", ".4g"), get("images_per_s_p80", ".4g")
    return {
        "case": record["case"],
        "images/s": get("images_per_s", ".4g"),
        "p20-p80": f"{low}-{high}",
        "step, ms": get("step_ms", ".4g"),
        "parts/step": get("share_of_parts", ".2f"),
        "loss": get("loss_share", ".1%"),
        "MFU": get("mfu", ".0%"),
        "host, ms": get("host_ms", ".4g"),
        "ops": get("ops", "d"),
        "launches": get("launches", "d"),
        "memory, MB": get("memory_mb", ".0f"),
        f"peer {record.get('peer', '')}".strip(): get("peer_images_per_s", ".4g"),
        "waits": get("peer_waiting", ".0%"),
        "times peer": get("times_peer", ".2f"),
    }


def grids(records: Sequence[Record]) -> list[tuple[str, list[list[str]], list[str]]]:
    """Title, lines and notes of each table; columns in which nothing stands are left out."""
    groups: dict[tuple, list[Record]] = {}
    run = 0
    for record in records:
        run += record["kind"] == "facts"
        if record["kind"] == "step":
            groups.setdefault((run, *(record[name] for name in SHARED)), []).append(record)
    found = []
    for group in groups.values():
        lines = [cells(record) for record in group]
        heads = list(dict.fromkeys(head for line in lines for head in line))
        heads = [h for h in heads if any(line.get(h, "-") != "-" for line in lines)]
        body = [[line.get(h, "-") for h in heads] for line in lines]
        absent = [f"{r['case']}: {r['peer_absent']}" for r in group if "peer_absent" in r]
        found.append((title(group), [heads, *body], absent))
    return found


def title(group: Sequence[Record]) -> str:
    """What the cases of a table share."""
    record = group[0]
    roles = [{r[role] for r in group if role in r} for role in ("teacher", "student")]
    pair = " -> ".join("/".join(sorted(names)) for names in roles if names)
    peak = f"{record['matmul_type']} matrix products {record['matmul_tflops']:.3g} TFLOP/s"
    return f"{record['recipe']} ({pair}): {', '.join(way(record))}; {peak}"


def way(record: Record) -> list[str]:
    """How a record's steps were run."""
    found = [record["device"], f"batch {record['batch']}", f"{record['size']} x {record['size']}"]
    found.append("float32" if record["amp"] == "off" else record["amp"])
    found.append("compiled" if record["compile"] else "eager")
    return [*found, "channels last"] if record["channels_last"] else found


def shown(records: Sequence[Record], markdown: bool) -> list[str | rich.table.Table]:
    """Titles, tables and notes in the order in which they are printed."""
    found: list[str | rich.table.Table] = []
    for heading, grid, notes in grids(records):
        found += [f"\n{heading}\n"]
        found += [report.in_markdown(grid) if markdown else drawn(grid)]
        found += notes and ["", *notes]
    return found


def drawn(grid: Sequence[Sequence[str]]) -> rich.table.Table:
    """A grid for a terminal."""
    heads, *body = grid
    table = rich.table.Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head == "case" else "right", no_wrap=True)
    for line in body:
        table.add_row(*map(Text, line))
    return table
