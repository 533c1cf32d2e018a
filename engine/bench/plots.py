"""Images a second as bars: a panel for each table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BAR = 0.25  # inches
MOST = 60  # characters of a title's line
WIDE = 30  # times the smallest rate: the largest is drawn on a logarithmic axis


@dataclass(frozen=True)
class Panel:
    """What is compared: by the name of a side, images a second of each case; None: it has none."""

    title: str
    cases: Sequence[str]
    sides: Mapping[str, Sequence[float | None]]


def rounded(rate: float) -> str:
    """To four digits, all of those before the point."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"


def plot(panels: Sequence[Panel], path: Path) -> None:
    """Draws the panels below one another into `path`, .svg or .png."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines of letters
    import matplotlib.pyplot as plt

    bars = [len(panel.cases) * len(panel.sides) for panel in panels]
    titles = [textwrap.wrap(panel.title, MOST) for panel in panels]
    heights = [BAR * n + 0.2 * len(t) + 0.6 for n, t in zip(bars, titles, strict=True)]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(6, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, panel, title in zip(axes[:, 0], panels, titles, strict=True):
        step = 1 / (len(panel.sides) + 0.5)
        for number, (side, rates) in enumerate(panel.sides.items()):
            drawn = [(at + number * step, r) for at, r in enumerate(rates) if r is not None]
            if drawn:
                made = axis.barh(*zip(*drawn, strict=True), step, label=side)
                axis.bar_label(made, fmt=rounded, padding=2, fontsize=7)
        middle = step * (len(panel.sides) - 1) / 2
        axis.set_yticks([at + middle for at in range(len(panel.cases))], panel.cases, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        drawn_rates = [r for rates in panel.sides.values() for r in rates if r is not None]
        if max(drawn_rates) > WIDE * min(drawn_rates):
            axis.set_xscale("log")
        axis.tick_params(axis="x", labelsize=7)
        axis.set_xlabel("images/s", fontsize=8)
        axis.set_title("\n".join(title), fontsize=8, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        if len(panel.sides) > 1:
            axis.legend(fontsize=7)
    figure.savefig(path)
    plt.close(figure)
