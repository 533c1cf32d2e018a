"""Whether networks are as often right as they say: ECE and the reliability diagram.

Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 2 and figure 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .drawing import WIDTH, Drawing, Panel, frame, line, rect, text

if TYPE_CHECKING:
    from .answers import Answers

TITLE = "Calibration"
BINS = 15
LEFT, TOP, SIDE, SHARES = 34, 28, 262, 44  # the diagram, and the height of the shares below


def bins(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> dict[str, list[Any]]:
    """Of each bin ((b - 1) / BINS, b / BINS]: images, their mean confidence and their accuracy,
    None of an empty one; `confidence` (n,) in (0, 1], `right` (n,)."""
    edges = np.arange(1, BINS) / BINS
    place = np.digitize(confidence, edges, right=True)  # the upper edge is the bin's own
    counts = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, weights, BINS) for weights in (confidence, right)]
    means = [
        [float(s / n) if n else None for s, n in zip(sum_, counts.tolist(), strict=True)]
        for sum_ in sums
    ]
    return {"images": counts.tolist(), "confidence": means[0], "accuracy": means[1]}


def ece(of: dict[str, list[Any]]) -> float:
    """The expected calibration error: sum over the bins of images / n * |accuracy - confidence|.

    Guo et al., equation 3; a share, not percent.
    """
    filled = [
        (n, confidence, accuracy)
        for n, confidence, accuracy in zip(
            of["images"], of["confidence"], of["accuracy"], strict=True
        )
        if n
    ]
    total = sum(n for n, _, _ in filled)
    return sum(n * abs(accuracy - confidence) for n, confidence, accuracy in filled) / total


def numbers(answers: Answers) -> dict[str, Any]:
    """The bins and the ECE of every network."""
    found = {}
    for name, network in answers.networks.items():
        right = network.top1 == answers.target
        of = bins(network.confidence, right)
        found[name] = {"ece": ece(of), "top1": 100 * float(right.mean()), **of}
    return {"bins": BINS, "networks": found}


def draw(found: dict[str, Any]) -> Drawing:
    networks = found["networks"]
    of_each = ", ".join(f"{name} {100 * of['ece']:.2f}%" for name, of in networks.items())
    words = (
        f"Expected calibration error (Guo et al., 2017): {of_each}. The images in "
        f"{found['bins']} bins of equal width by the largest softmax probability at temperature "
        "1; the mean over the images of |accuracy - mean confidence| of their bin. Filled: the "
        "accuracy of a bin; the mark: its mean confidence; below the dashed line a network is "
        "surer than it is right. At the foot: the share of the images in each bin."
    )
    return Drawing(words, [_panel(name, of) for name, of in networks.items()])


def _panel(name: str, of: dict[str, Any]) -> Panel:
    wide = SIDE / len(of["images"])
    foot = TOP + SIDE  # of the diagram
    floor = foot + 30 + SHARES  # of the shares
    total, most = sum(of["images"]), max(of["images"])
    body = [frame(LEFT, TOP, SIDE, SIDE), line(LEFT, foot, LEFT + SIDE, TOP, "soft", dashed=True)]
    each = zip(of["images"], of["confidence"], of["accuracy"], strict=True)
    for i, (n, confidence, accuracy) in enumerate(each):
        if not n:
            continue
        x, share = LEFT + i * wide, n / total
        hint = f"{n} images, confidence {100 * confidence:.1f}%, accuracy {100 * accuracy:.1f}%"
        high = SIDE * accuracy
        body.append(rect(x + 1, foot - high, wide - 2, high, "k0", 0.55, hint))
        body.append(rect(x + 1, foot - SIDE * confidence - 1.5, wide - 2, 3, "k1", hint=hint))
        tall = SHARES * n / most
        body.append(rect(x + 1, floor - tall, wide - 2, tall, "soft", 0.6, f"{100 * share:.1f}%"))
    for tick in (0, 0.5, 1):
        body.append(text(LEFT - 5, foot - SIDE * tick + 4, f"{100 * tick:g}", anchor="end"))
        body.append(text(LEFT + SIDE * tick, foot + 14, f"{100 * tick:g}", anchor="middle"))
    body += [
        text(10, TOP + SIDE / 2, "accuracy, percent", anchor="middle", turned=True),
        text(LEFT, floor + 14, f"confidence, percent; most images in a bin: {most / total:.0%}"),
    ]
    title = f"{name}: ECE {100 * of['ece']:.2f}%, top-1 {of['top1']:.2f}"
    return Panel(title, floor + 20, body, width=WIDTH)
