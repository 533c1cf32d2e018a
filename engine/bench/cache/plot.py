"""Students' accuracy over the bytes of their teacher's answers: a panel for each recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ....kernels.bench.report import Record
from ..tables import grids
from .table import SHARED, cells


def plot(records: Sequence[Record], path: Path) -> None:
    """Draws into `path`, .svg or .png. Bars are the deviation over seeds, the band is that of the
    teacher at work."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines of letters
    import matplotlib.pyplot as plt

    panels = [group for group, _ in grids(records, "cache", SHARED, cells)]
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    for unused in axes.flat[len(panels) :]:
        unused.remove()
    names = list(dict.fromkeys(name for group in panels for name in _lines(group)))
    colours = {name: f"C{number + 1}" for number, name in enumerate(names)}  # alike in all panels
    for axis, group in zip(axes.flat, panels, strict=False):
        for record in group:
            if record["side"] == "live":
                spread = record["deviation"] or 0.0
                low, high = record["mean"] - spread, record["mean"] + spread
                axis.axhspan(low, high, color="C0", alpha=0.15, linewidth=0)
                axis.axhline(record["mean"], color="C0", label="the teacher at work")
        for name, own in _lines(group).items():
            axis.errorbar(
                [r["image_bytes"] for r in own],
                [r["mean"] for r in own],
                [r["deviation"] or 0.0 for r in own],
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1,
                color=colours[name],
                label=name,
            )
        axis.set_xscale("log")
        sizes = sorted({record["image_bytes"] for own in _lines(group).values() for record in own})
        axis.set_xticks(sizes, [f"{size:,d}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("bytes an image, over all its views", fontsize=8)
        axis.set_ylabel("top-1, %", fontsize=8)
        first = group[0]
        title = f"{first['recipe']}: {first['teacher']} -> {first['student']}"
        axis.set_title(title, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=6)
    figure.savefig(path)
    plt.close(figure)


def _lines(group: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of one form with several numbers of views are one line."""
    found: dict[str, list[Record]] = {}
    for record in group:
        if record["side"] != "live":
            words = [w for w in record["side"].split(",") if not w.startswith("views=")]
            found.setdefault(", ".join(words), []).append(record)
    return {name: sorted(own, key=lambda r: r["image_bytes"]) for name, own in found.items()}
