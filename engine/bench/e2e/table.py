"""The records of training end to end as tables: one for each run and way of running."""

from __future__ import annotations

from collections.abc import Sequence

import rich.table

from ....kernels.bench import report
from ....kernels.bench.report import Record, number
from ..step.table import drawn, way

# What a table's cases share.
SHARED = ("recipe", "device", "batch", "size", "amp", "compile", "channels_last", "loader")


def cells(record: Record) -> dict[str, str]:
    """A record's line, by its columns' headings."""

    def get(name: str, form: str) -> str:
        return number(record.get(name), form)

    low, high = get("p20_images_per_s", ".4g"), get("p80_images_per_s", ".4g")
    return {
        "case": record["case"],
        "images/s": get("images_per_s", ".4g"),
        "p20-p80": f"{low}-{high}",
        "waits": get("waiting", ".0%"),
        "step alone": get("step_images_per_s", ".4g"),
        "input alone": get("input_images_per_s", ".4g"),
        "of the slower": get("of_slower", ".0%"),
        "of one after the other": get("of_sum", ".0%"),
        f"peer {record.get('peer', '')}".strip(): get("peer_images_per_s", ".4g"),
        "peer waits": get("peer_waiting", ".0%"),
        "times peer": get("times_peer", ".2f"),
    }


def shown(records: Sequence[Record], markdown: bool) -> list[str | rich.table.Table]:
    """Titles, tables and notes in the order in which they are printed."""
    groups: dict[tuple, list[Record]] = {}
    run = 0
    for record in records:
        run += record["kind"] == "facts"
        if record["kind"] == "e2e":
            groups.setdefault((run, *(record[name] for name in SHARED)), []).append(record)
    found: list[str | rich.table.Table] = []
    for group in groups.values():
        lines = [cells(record) for record in group]
        heads = list(dict.fromkeys(head for line in lines for head in line))
        heads = [h for h in heads if any(line.get(h, "-") != "-" for line in lines)]
        grid = [heads, *([line.get(h, "-") for h in heads] for line in lines)]
        found += [f"\n{title(group[0])}\n", report.in_markdown(grid) if markdown else drawn(grid)]
        notes = [f"{r['case']}: {r['peer_absent']}" for r in group if "peer_absent" in r]
        found += notes and ["", *notes]
    return found


def title(record: Record) -> str:
    """What the cases of a table share."""
    images = f"{record['set_images']} images of {record['mean_width']:.0f} x "
    images += f"{record['mean_height']:.0f} pixels"
    if record["mean_bytes"] is not None:
        images += f", {record['mean_bytes'] / 1000:.3g} kB"
    read = f"loader {record['loader']} ({record['decode']}), {record['workers']} workers, "
    read += f"{record['cores']} cores"
    return f"{record['recipe']}: {', '.join(way(record))}; {images}; {read}"
