"""Draws the benchmark's records: time and share of the copy's speed, over N and over C."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Record, grouped

PROVIDERS = ("cpu", "cuda", "triton", "reference", "eager", "compiled", "liger", "quack", "apex")
PANELS = (
    ("rows", "classes", "median_ms"),
    ("classes", "rows", "median_ms"),
    ("rows", "classes", "share_of_copy"),
    ("classes", "rows", "share_of_copy"),
)
NAMES = {"rows": "N", "classes": "C", "median_ms": "ms", "share_of_copy": "share of copy"}


def series(records: Sequence[Record], x: str, held: str, y: str) -> tuple[int, dict[str, list]]:
    """The held size with the most others, and (x, y) points of each provider at it."""
    sizes = {(r[held], r[x]) for r in records}
    counts = Counter(fixed for fixed, _ in sizes)
    fixed = max(counts, key=lambda size: (counts[size], size))
    points: dict[str, list] = {p: [] for p in PROVIDERS}
    for r in sorted(records, key=lambda r: r[x]):
        if r[held] == fixed and r["provider"] in points and r[y] is not None:
            points[r["provider"]].append((r[x], r[y]))
    return fixed, {p: found for p, found in points.items() if found}


def draw(axis: Any, records: Sequence[Record], panel: tuple[str, str, str]) -> None:
    x, held, y = panel
    fixed, lines = series(records, x, held, y)
    ticks = sorted({r[x] for r in records if r[held] == fixed})
    if len(ticks) < 2 <= len({(r["rows"], r["classes"]) for r in records}):
        axis.set_axis_off()  # one size is no line; the other panels show it
        return
    for provider, points in lines.items():
        colour = f"C{PROVIDERS.index(provider)}"
        axis.plot(*zip(*points, strict=True), "o-", color=colour, label=provider, markersize=3)
    axis.set_xscale("log", base=2)
    if y == "share_of_copy":
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set_ylim(bottom=0)
    else:
        axis.set_yscale("log")
    axis.set_xticks(ticks, [str(t) for t in ticks], fontsize=7)
    axis.minorticks_off()
    axis.tick_params(labelsize=7)
    axis.set_xlabel(f"{NAMES[x]}, {NAMES[held]} = {fixed}", fontsize=8)
    axis.set_ylabel(NAMES[y], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def plot(records: Sequence[Record], path: Path) -> None:
    """A row of panels for each case and type; of several turns or clocks the one measured most."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines of letters
    import matplotlib.pyplot as plt

    flat = [r for by in grouped(records).values() for r in by.values()]
    ways = Counter((r["device"], r["turn"], r["clock"]) for r in flat)
    (way, _), *_ = ways.most_common(1)
    chosen = [r for r in flat if (r["device"], r["turn"], r["clock"]) == way]
    kinds = list(dict.fromkeys((r["case"], r["dtype"]) for r in chosen))
    shape = (len(kinds), len(PANELS))
    size = (3.4 * shape[1], 2.3 * shape[0] + 0.6)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for row, kind in zip(axes, kinds, strict=True):
        mine = [r for r in chosen if (r["case"], r["dtype"]) == kind]
        for axis, panel in zip(row, PANELS, strict=True):
            draw(axis, mine, panel)
        row[0].set_title(", ".join(kind), fontsize=9, loc="left")
        row[0].legend(fontsize=7)
    device, turn, clock = way
    figure.suptitle(
        f"forward and backward, medians: {device}, {turn} turns, {clock} clock", fontsize=10
    )
    figure.savefig(path)
    plt.close(figure)
