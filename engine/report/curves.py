"""Curves of a run as inline SVG whose colours are the page's, so that they suit light and dark."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..run.past import AP, PastRun, Seeds

COLOURS = 8  # the page defines --c0 .. --c7
CLOCK = ("images_per_s", "data_wait", "time")
NOT_LOSSES = ("kind", "step", "epoch", "lr", "top1", "top5", "rows", "skipped", *CLOCK)
# Beside accuracy, by the beginning of a value's name in evaluations (training/trajectories.py).
TRAJECTORIES = {
    "agreement_": "Same class as the teacher, percent",
    "kl_": "Divergence (KL) at T = 1, nats",
    "softened_kl_": "Divergence (KL) at the method's T, nats",
    "entropy_": "Entropy of the predictions, nats",
}
PARTS_OF_AP = {
    "ap50": "IoU 0.50",
    "ap75": "IoU 0.75",
    "ap_small": "small objects",
    "ap_medium": "medium objects",
    "ap_large": "large objects",
}

# Matplotlib wants a real colour; these stand for the page's and are replaced in its output.
_INK, _GRID = "#fe0000", "#fe0001"
_PAGE = {_INK: "var(--soft)", _GRID: "var(--line)"}
_PAGE |= {f"#fe01{i:02x}": f"var(--c{i})" for i in range(COLOURS)}


@dataclass(frozen=True)
class Line:
    """One curve: `x` in epochs; a single `y` is a level line across the chart."""

    label: str
    x: list[float]
    y: list[float]
    colour: int = 0
    dashed: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart and its legend; `svg` is '' while there is nothing to draw."""

    title: str
    lines: list[Line]
    wide: bool = False

    @cached_property
    def svg(self) -> str:
        return _draw(self) if any(line.x for line in self.lines) else ""


def charts(run: PastRun) -> list[Chart]:
    """Scores, trajectories, loss terms, learning rate and speed of one run."""
    return [
        Chart(f"{run.score.title}, percent", _score_lines(run), wide=True),
        *([Chart("Box AP by overlap and by size", _part_lines(run))] if run.score == AP else []),
        *(
            Chart(title, lines)
            for start, title in TRAJECTORIES.items()
            if (lines := _trajectory_lines(run, start))
        ),
        Chart("Loss terms in training", _loss_lines(run)),
        Chart("Learning rate", _rate_lines(run)),
        Chart("Images a second", _clock_lines(run, "images_per_s")),
        Chart("Waiting for data, share of the time", _clock_lines(run, "data_wait")),
    ]


def comparison(groups: list[Seeds]) -> Chart:
    """The student's score, the same for all, in every run; one colour a recipe over its seeds."""
    score = groups[0].score
    lines = [
        Line(
            group.name if number == 0 else "",
            *_points(run.evaluations, score.key),
            colour=index % COLOURS,
            dashed=index >= COLOURS,
        )
        for index, group in enumerate(groups)
        for number, run in enumerate(group.runs)
    ]
    return Chart(f"Student's {score.name}, percent", [line for line in lines if line.x], wide=True)


def _score_lines(run: PastRun) -> list[Line]:
    """Student, its average, SL-Ts, and as level lines the teacher and the published number."""
    evaluations, score = run.evaluations, run.score.key
    ending = f"_{score}"
    found = {key for record in evaluations for key in record if key.endswith(ending)}
    keys = sorted(key for key in found if not key.startswith(("teacher_", "train_")))
    networks = {score: "student"} | {key: _network_name(key.removesuffix(ending)) for key in keys}
    lines = [
        Line(name, *_points(evaluations, key), index % 6)
        for index, (key, name) in enumerate(networks.items())
    ]
    training = _points(run.of_kind("step"), score)
    lines.append(Line("student, training batches", *training, colour=0, faint=True))
    teacher = [value for r in run.records if (value := r.get(f"teacher_{score}")) is not None]
    if teacher:
        lines.append(Line(f"teacher {teacher[-1]:.2f}", [], teacher[-1:], 6, dashed=True))
    published = run.published
    if published is not None:
        lines.append(Line(f"published {published:.2f}", [], [published], 7, dashed=True))
    return [line for line in lines if line.y]


def _network_name(name: str) -> str:
    if name == "ema":
        return "student, averaged (EMA)"
    return f"SL-T {name.removeprefix('slt')}" if name.startswith("slt") else name


def _trajectory_lines(run: PastRun, start: str) -> list[Line]:
    """What evaluations have of one kind; of divergences `p to q` is KL(p || q)."""
    keys = dict.fromkeys(k for r in run.evaluations for k in r if k.startswith(start))
    named = {
        key: " to ".join(map(_network_name, key.removeprefix(start).split("_to_"))) for key in keys
    }
    return [
        Line(name, *_points(run.evaluations, key), i % COLOURS, dashed=i >= COLOURS)
        for i, (key, name) in enumerate(named.items())
    ]


def _part_lines(run: PastRun) -> list[Line]:
    lines = [
        Line(name, *_points(run.evaluations, key), index)
        for index, (key, name) in enumerate(PARTS_OF_AP.items())
    ]
    return [line for line in lines if line.y]  # no object of a size has no AP


def _loss_lines(run: PastRun) -> list[Line]:
    steps = run.of_kind("step")
    keys = list(dict.fromkeys(k for r in steps for k in r if k not in NOT_LOSSES))
    numbers = [k for k in keys if not k.endswith(("_top1", "_top5"))]
    return [
        Line(key, *_points(steps, key), i % COLOURS, dashed=i >= COLOURS)
        for i, key in enumerate(numbers)
    ]


def _rate_lines(run: PastRun) -> list[Line]:
    found = [line for kind in ("step", "epoch") if (line := _points(run.of_kind(kind), "lr"))[0]]
    return [Line("learning rate", *found[0])] if found else []


def _clock_lines(run: PastRun, key: str) -> list[Line]:
    return [Line("", *_points(run.of_kind("step"), key))]


def _points(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(r["epoch"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [x for x, _ in points], [y for _, y in points]


def _draw(chart: Chart) -> str:
    # Most of a second, which a training that draws at its end need not wait for at its start.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": repr(chart),  # one page holds several charts: names must not meet
        "font.size": 9,
    }
    with rc_context(style):
        width, height = 9.6 if chart.wide else 4.6, 3.0
        # Matplotlib's own layout takes longer than all else. Room for seven characters on the left,
        # for "1e-5" above, for a line of numbers and one of words below.
        left, right, below, above = 0.63 / width, 1 - 0.1 / width, 0.5 / height, 1 - 0.2 / height
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left, below, right - left, above - below))
        for line in chart.lines:
            look: dict[str, Any] = {
                "color": f"#fe01{line.colour:02x}",
                "linestyle": "--" if line.dashed else "-",
                "linewidth": 0.9 if line.faint else 1.6,
                "alpha": 0.45 if line.faint else None,
            }
            if line.x:
                dot = "o" if len(line.x) == 1 else ""
                axes.plot(line.x, line.y, marker=dot, markersize=4, **look)
            else:
                axes.axhline(line.y[0], **look)
        axes.grid(axis="y", color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(colors=_INK, length=0, pad=5)
        axes.set_xlabel("epochs", color=_INK)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        if max(x for line in chart.lines for x in line.x) >= 2:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        text = io.StringIO()
        figure.savefig(text, format="svg")
    return _for_page(text.getvalue())


def _for_page(svg: str) -> str:
    """Only the <svg> element: no metadata, no size, no clipping, no names that charts share."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' clip-path="[^"]*"|<clipPath.*?</clipPath>', "", svg, flags=re.DOTALL)
    named = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in named else "", svg)
    for stand_in, colour in _PAGE.items():
        svg = svg.replace(stand_in, colour)
    return svg.strip()
