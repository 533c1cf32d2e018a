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
    figure, axes = plt.subplots(
        len(panels), figsize=(6, 3.2 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, group in zip(axes[:, 0], panels, strict=True):
        for record in group:
            if record["side"] == "live":
                spread = record["deviation"] or 0.0
                axis.axhspan(record["mean"] - spread, record["mean"] + spread, alpha=0.15)
                axis.axhline(record["mean"], label="the teacher at work")
        for name, own in _lines(group).items():
            axis.errorbar(
                [r["image_bytes"] for r in own],
                [r["mean"] for r in own],
                [r["deviation"] or 0.0 for r in own],
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1,
                label=name,
            )
        axis.set_xscale("log")
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
