"""The records of the input path's benchmark, read back and put into rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

from ....kernels.bench.report import Record, number
from ..plots import Panel

HEADS = [
    "mode", "loader", "decode", "workers", "batch", "size", "images/s", "p20-p80", "per core",
    "per CPU second", "memory, MB", "times peer",
]  # fmt: skip


def of_loaders(records: Sequence[Record]) -> list[Record]:
    """What was measured, and what was absent."""
    return [r for r in records if r["kind"] in ("loader", "absent")]


def as_line(record: Record) -> str:
    """A record as it comes."""
    if record["kind"] == "absent":
        return f"{record['mode']} {record['loader']} takes no part: {record['why_not']}"
    return f"{record['mode']} {record['loader']}: {record['images_per_s']:.4g} images/s"


def about(records: Sequence[Record]) -> list[str]:
    """Which images were measured, a line for each set; then what is absent."""
    sets = []
    for record in records:
        if record["kind"] == "loader":
            length = record["mean_bytes"]
            size = "in memory" if length is None else f"of {length / 1000:.0f} kB"
            sets.append(
                f"{record['set_images']} images {size}, {record['mean_width']:.0f} x "
                f"{record['mean_height']:.0f} pixels on average; {record['cores']} cores"
            )
    lost = [as_line(record) for record in records if record["kind"] == "absent"]
    return list(dict.fromkeys(sets + lost))


def grid(records: Sequence[Record]) -> list[list[str]]:
    """The heads and a row for each measurement."""
    return [HEADS, *(_row(record) for record in records if record["kind"] == "loader")]


def panels(records: Sequence[Record]) -> list[Panel]:
    """A panel for each mode and set of images."""
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        if r["kind"] == "loader":
            groups.setdefault((r["mode"], *about([r]), r["workers"]), []).append(r)
    return [
        Panel(
            f"{mode}: {images}, {workers} workers",
            [r["loader"] for r in group],
            {"images/s": [r["images_per_s"] for r in group]},
        )
        for (mode, images, workers), group in groups.items()
    ]


def _row(record: Record) -> list[str]:
    low, high = record["p20_images_per_s"], record["p80_images_per_s"]
    memory = [record["resident_bytes_first"], record["resident_bytes_last"]]
    return [
        record["mode"],
        record["loader"],
        record["decode"],
        str(record["workers"]),
        str(record["batch"]),
        str(record["size"]),
        f"{record['images_per_s']:.0f}",
        f"{low:.0f}-{high:.0f}",
        f"{record['images_per_s_per_core']:.0f}",
        number(record["images_per_cpu_s"], ".0f"),
        "-" if None in memory else "-".join(f"{one / 1e6:.0f}" for one in memory),
        number(record["times_peer"], ".2f"),
    ]
