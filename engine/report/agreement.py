"""How often networks and the teacher give the same answer, and who is right where they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .drawing import WIDTH, Drawing, Panel, rect, text

if TYPE_CHECKING:
    from .answers import Answers

TITLE = "Agreement with the teacher"
# The cases in the order of their bars, each with its colour.
CASES = {
    "both right": "k0",
    "the same error": "k5",
    "the network alone right": "k2",
    "the teacher alone right": "k1",
    "different errors": "k3",
}


def cases(
    top1: NDArray[np.int64], teacher: NDArray[np.int64], target: NDArray[np.int64]
) -> dict[str, int]:
    """The images of each case; the arrays are (n,) classes."""
    right, taught, same = top1 == target, teacher == target, top1 == teacher
    found = (right & taught, same & ~right, right & ~taught, taught & ~right)
    counts = [int(case.sum()) for case in found]
    return dict(zip(CASES, [*counts, len(target) - sum(counts)], strict=True))


def numbers(answers: Answers) -> dict[str, Any]:
    """Of every network but the teacher the share of equal top-1, and the images of each case."""
    teacher = answers.networks["teacher"].top1
    found = {}
    for name, network in answers.networks.items():
        if name != "teacher":
            same = float((network.top1 == teacher).mean())
            found[name] = {"share": same, "images": cases(network.top1, teacher, answers.target)}
    return {"networks": found}


def draw(found: dict[str, Any]) -> Drawing:
    shares = ", ".join(f"{name} {of['share']:.2%}" for name, of in found["networks"].items())
    words = (
        f"Images to which a network's top-1 is the teacher's, whatever their class: {shares}. "
        "Of all images the share of each case, in percent."
    )
    return Drawing(words, [_bars(name, of) for name, of in found["networks"].items()])


def _bars(name: str, of: dict[str, Any]) -> Panel:
    total = sum(of["images"].values())
    body, x, y = [], 0.0, 62
    for case, colour in CASES.items():
        images = of["images"][case]
        wide = WIDTH * images / total
        body.append(rect(x, 24, max(wide - 1, 0), 20, colour, hint=f"{case}: {images}"))
        body.append(rect(0, y - 9, 10, 10, colour))
        body.append(text(16, y, case))
        body.append(text(WIDTH, y, f"{images} ({images / total:.1%})", anchor="end"))
        x += wide
        y += 17
    return Panel(f"{name}: {of['share']:.1%} as the teacher", y - 6, body)
