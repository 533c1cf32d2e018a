"""The records of training end to end as tables: one for each run and way of running."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ....kernels.bench.report import Record, number
from .. import tables
from ..plots import Panel
from ..step.table import way

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


def title(group: Sequence[Record]) -> str:
    """What the cases of a table share."""
    record = group[0]
    images = f"{record['set_images']} images of {record['mean_width']:.0f} x "
    images += f"{record['mean_height']:.0f} pixels"
    if record["mean_bytes"] is not None:
        images += f", {record['mean_bytes'] / 1000:.3g} kB"
    read = f"loader {record['loader']} ({record['decode']}), {record['workers']} workers, "
    read += f"{record['cores']} cores"
    return f"{record['recipe']}: {', '.join(way(record))}; {images}; {read}"


def panels(records: Sequence[Record]) -> list[Panel]:
    """The same tables as bars."""
    sides = {
        "step alone": "step_images_per_s",
        "input alone": "input_images_per_s",
        "both": "images_per_s",
        "plain loop": "peer_images_per_s",
    }
    return [
        Panel(
            title(group),
            [r["case"] for r in group],
            {name: [r.get(field) for r in group] for name, field in sides.items()},
        )
        for group, _ in tables.grids(records, "e2e", SHARED, cells)
    ]


def shown(records: Sequence[Record], markdown: bool) -> list[str | Table]:
    """What is printed of the records of training end to end."""
    return tables.shown(tables.grids(records, "e2e", SHARED, cells), title, markdown)
