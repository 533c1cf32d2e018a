"""Pictures as SVG panels in the page's colours, so that they suit light and dark.

A panel is drawn at its own size in pixels; places are in pixels from its upper left corner.
"""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# The page's colours by their names. --k0 to --k6 are for places and bars: on light and dark the
# colour-blind can tell them apart; --k0 is blue and --k1 orange, as words beside pictures say.
COLOURS = (Path(__file__).resolve().parent / "templates" / "colours.css").read_text("utf-8")
KINDS = 7  # --k0 .. --k6
MARKERS = 3  # of places: a dot, a cross, a triangle
WIDTH = 312  # of a panel: three beside each other on the page, one on a phone

_STYLE = "text{font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}"
_SHEET = 1008  # px, the most that a file is wide
_LINE = 16  # px


@dataclass(frozen=True)
class Panel:
    """One drawing; it is not shown narrower than `least` pixels."""

    title: str
    height: int
    body: list[str]  # SVG elements, below the first 20 pixels, which the title takes
    width: int = WIDTH
    least: int = 0

    @property
    def svg(self) -> str:
        """An element for the page."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="panel" role="img" '
            f'viewBox="0 0 {self.width} {self.height}" aria-label="{html.escape(self.title)}" '
            f'style="width:{self.width}px;min-width:min({self.least}px,{self.width}px)">'
            f"{self.inside}</svg>"
        )

    @property
    def inside(self) -> str:
        return text(0, 11, self.title, colour="ink", bold=True) + "".join(self.body)


@dataclass(frozen=True)
class Drawing:
    """What a picture shows, in words with its numbers, and its panels."""

    words: str
    panels: list[Panel]


def sheet(title: str, drawing: Drawing) -> str:
    """The drawing as a file of its own, for light and dark."""
    lines = textwrap.wrap(drawing.words, 150)
    parts = ['<rect x="-12" y="-8" width="100%" height="100%" style="fill:var(--card)"/>']
    parts.append(text(0, 14, title, colour="ink", bold=True))
    parts += [text(0, 34 + _LINE * i, line) for i, line in enumerate(lines)]
    x = width = row = 0
    y = 40 + _LINE * len(lines)
    for panel in drawing.panels:
        if x and x + panel.width > _SHEET:
            x, y, row = 0, y + row + 20, 0
        parts.append(f'<g transform="translate({x} {y})">{panel.inside}</g>')
        row, width = max(row, panel.height), max(width, x + panel.width)
        x += panel.width + 24
    longest = max((len(line) for line in [title, *lines]), default=0)
    width, height = max(width, 6 * longest), y + row
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -8 {width + 24} {height + 16}" '
        f'width="{width + 24}" height="{height + 16}">'
        f"<style>{COLOURS}{_STYLE}</style>{''.join(parts)}</svg>\n"
    )


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    colour: str = "soft",
    bold: bool = False,
    turned: bool = False,
) -> str:
    """Words on the line `y`; turned, they read upwards."""
    weight = ' font-weight="600"' if bold else ""
    turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" font-size="11" text-anchor="{anchor}"{weight}{turn} '
        f'style="fill:var(--{colour})">{html.escape(words)}</text>'
    )


def rect(
    x: float, y: float, width: float, height: float, colour: str, opacity: float = 1, hint: str = ""
) -> str:
    """A filled rectangle; a pointer that rests on it is shown the hint."""
    title = f"<title>{html.escape(hint)}</title>" if hint else ""
    return (
        f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
        f'style="fill:var(--{colour});fill-opacity:{opacity:.2g}">{title}</rect>'
    )


def line(
    x1: float, y1: float, x2: float, y2: float, colour: str = "line", dashed: bool = False
) -> str:
    dash = ";stroke-dasharray:4 3" if dashed else ""
    return (
        f'<path d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}" style="stroke:var(--{colour});fill:none'
        f'{dash}"/>'
    )


def frame(x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
        'style="fill:none;stroke:var(--line)"/>'
    )


def places(
    points: Iterable[Sequence[float]], kind: int, size: float = 5, opacity: float = 1
) -> str:
    """Marks at (x, y), the same for all: the kind is a colour and, every KINDS of them, a shape.

    They are one path, a few bytes a mark.
    """
    colour, marker = kind % KINDS, kind // KINDS % MARKERS
    r = size / 2
    shapes = (
        "h0",
        f"m{-r} {-r}l{size} {size}m0 {-size}l{-size} {size}",
        f"m0 {-r}l{r} {size}h{-size}z",
    )
    path = "".join(f"M{_n(x)} {_n(y)}{shapes[marker]}" for x, y in points)
    look = (
        f"stroke:var(--k{colour});stroke-width:{size};stroke-linecap:round;fill:none",
        f"stroke:var(--k{colour});stroke-width:1.4;fill:none",
        f"fill:var(--k{colour});stroke:none",
    )[marker]
    return f'<path d="{path}" style="{look};opacity:{opacity:.2g}"/>'


def picture(x: float, y: float, width: float, height: float, kind: str, data: bytes) -> str:
    """An image file of that kind (png, jpeg); few pixels become squares."""
    coded = base64.b64encode(data).decode()
    return (
        f'<image x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
        'preserveAspectRatio="xMidYMid" style="image-rendering:pixelated" '
        f'href="data:image/{kind};base64,{coded}"/>'
    )


def short(name: str, most: int) -> str:
    """A name of at most so many characters."""
    return name if len(name) <= most else f"{name[: most - 2]}.."


def _n(value: float) -> str:
    """A number in as few characters as a tenth of a pixel takes."""
    return f"{value:.1f}".removesuffix(".0")
