"""Which classes a student takes for which: the confusion matrix, the worst pairs, their images."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawing import WIDTH, Drawing, Panel, frame, picture, rect, short, text

if TYPE_CHECKING:
    from .answers import Answers

TITLE = "Confusion matrix of the student"
MOST = 30  # classes that are drawn
PAIRS, EACH = 8, 6  # the pairs that are shown, and images of each
SIDE = 40  # px of an image


def counts(target: NDArray[np.int64], top1: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """(C, C) images by their class (row) and by what they are taken for (column)."""
    return np.bincount(target * classes + top1, minlength=classes**2).reshape(classes, classes)


def pairs(matrix: NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """The cells beside the diagonal with the most images, at most so many; none that is empty."""
    wrong = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]  # of equal ones the lower classes
    found = [divmod(int(cell), len(matrix)) for cell in order]
    return [(true, taken) for true, taken in found if wrong[true, taken]]


def confused(matrix: NDArray[np.int64], most: int) -> list[int]:
    """The classes with the most errors, as truth or as answer, at most so many, by number."""
    wrong = matrix - np.diag(matrix.diagonal())
    return sorted(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:most].tolist())


def numbers(answers: Answers) -> dict[str, Any]:
    """The cells that are not empty, as [class, taken for, images], and the worst pairs; the images
    of those as JPEG files in base64."""
    top1 = answers.networks["student"].top1
    matrix = counts(answers.target, top1, len(answers.classes))
    shown = []
    for true, taken in pairs(matrix, PAIRS):
        rows = answers.rows[(answers.target == true) & (top1 == taken)]
        files = [file for row in rows[:EACH].tolist() if (file := _small(answers.image(row)))]
        shown.append({"class": true, "taken_for": taken, "pictures": files})
    cells = np.argwhere(matrix)
    return {
        "classes": answers.classes,
        "cells": [[*cell, int(matrix[tuple(cell)])] for cell in cells.tolist()],
        "pairs": shown,
    }


def _small(image: Image.Image | None) -> str:
    if image is None:
        return ""
    image.thumbnail((SIDE, SIDE))
    image.save(data := io.BytesIO(), "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()


def draw(found: dict[str, Any]) -> Drawing:
    names = found["classes"]
    matrix = np.zeros((len(names), len(names)), np.int64)
    for true, taken, images in found["cells"]:
        matrix[true, taken] = images
    shown = confused(matrix, MOST)
    few = (
        f"Of {len(names)} classes the {MOST} with the most errors, as truth or as answer. "
        if len(names) > MOST
        else ""
    )
    wrong = int(matrix.sum() - matrix.trace())
    words = (
        f"{wrong} of {int(matrix.sum())} validation images are taken for another class. {few}Each "
        "row is a class, each column what its images are taken for. The diagonal is blue; errors "
        "are orange, the more the stronger, by the square root of their share of the row. Then "
        "the pairs with the most errors, and images of them."
    )
    panels = [_matrix(matrix, names, shown)]
    if found["pairs"]:
        panels.append(_pairs(matrix, names, found["pairs"]))
    return Drawing(words, panels)


def _matrix(matrix: NDArray[np.int64], names: list[str], shown: list[int]) -> Panel:
    part = matrix[np.ix_(shown, shown)]
    shares = part / np.maximum(matrix.sum(1)[shown, None], 1)  # of all images of the row's class
    worst = (shares - np.diag(shares.diagonal())).max() or 1
    labels = [short(names[i], 12) for i in shown]
    longest = max(len(label) for label in labels)
    left, top = 22 + 6.2 * longest, 40 + 6.2 * longest
    roomy = len(shown) <= 12
    cell = (WIDTH - left) / len(shown) if roomy else 13
    side = cell * len(shown)
    body = [
        text(left + side / 2, 29, "taken for", anchor="middle"),
        text(10, top + side / 2, "class", anchor="middle", turned=True),
        frame(left, top, side, side),
    ]
    for i, label in enumerate(labels):
        middle = (i + 0.5) * cell + 4
        body.append(text(left - 5, top + middle, label, anchor="end"))
        body.append(text(left + middle, top - 5, label, turned=True))
    for i, j in np.argwhere(part).tolist():
        share = shares[i, j]
        dark = share if i == j else (share / worst) ** 0.5
        hint = f"{names[shown[i]]} taken for {names[shown[j]]}: {part[i, j]} ({share:.1%})"
        x, y = left + j * cell, top + i * cell
        body.append(rect(x, y, cell, cell, "k0" if i == j else "k1", 0.65 * dark, hint))
        if roomy and part[i, j] < 10**3:
            middle = x + cell / 2
            body.append(
                text(middle, y + cell / 2 + 4, str(part[i, j]), anchor="middle", colour="ink")
            )
    wide = WIDTH if roomy else round(left + side + 2)
    return Panel(
        "Classes and answers", round(top + side + 4), body, wide, least=0 if roomy else wide
    )


def _pairs(matrix: NDArray[np.int64], names: list[str], shown: list[dict[str, Any]]) -> Panel:
    body, y = [], 34
    for pair in shown:
        true, taken = pair["class"], pair["taken_for"]
        images = int(matrix[true, taken])
        share = images / matrix[true].sum()
        words = f"{short(names[true], 13)} taken for {short(names[taken], 13)}"
        body.append(text(0, y, f"{words}: {images} ({share:.1%})"))
        for i, file in enumerate(pair["pictures"]):
            body.append(picture(i * (SIDE + 6), y + 5, SIDE, SIDE, "jpeg", base64.b64decode(file)))
        y += SIDE + 28
    return Panel("The most confused pairs", y, body)
