"""How the logits of classes go together: the student's correlations minus the teacher's.

Tian et al., "Contrastive Representation Distillation" (ICLR 2020), compare the two matrices so.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawing import Drawing, Panel, picture, text

if TYPE_CHECKING:
    from .answers import Answers

TITLE = "Correlation of the classes' logits"
MOST = 100  # classes, or blocks of classes, in a row
ABOVE, BELOW = (217, 95, 14), (47, 132, 201)  # on light and dark; 0 is transparent
SIDE = 300


class Moments:
    """Sums of rows (b, C) and of their products, from which correlations follow.

    They are taken about the first row, so that a column that never changes has no variance at all.
    """

    def __init__(self) -> None:
        self._first: NDArray[np.float64] | None = None
        self._count = 0

    def add(self, rows: NDArray[np.float64]) -> None:
        if self._first is None:
            self._first = rows[0].copy()
            self._sum = np.zeros_like(self._first)
            self._products = np.zeros((len(self._first), len(self._first)))
        own = rows - self._first
        self._count += len(own)
        self._sum += own.sum(0)
        self._products += own.T @ own

    def correlation(self) -> NDArray[np.float64]:
        """(C, C) Pearson's correlation of the columns; 0 for one that never changes."""
        covariance = self._products - np.outer(self._sum, self._sum) / self._count
        deviation = np.sqrt(covariance.diagonal().clip(0))
        both = np.outer(deviation, deviation)
        return np.divide(covariance, both, out=np.zeros_like(both), where=both > 0).clip(-1, 1)


def numbers(answers: Answers) -> dict[str, Any]:
    """Both matrices and their mean absolute difference over all pairs of different classes.

    Above MOST classes the mean absolute differences of blocks of classes, in place of the matrices.
    """
    student, teacher = (answers.networks[name].moments for name in ("student", "teacher"))
    assert student is not None and teacher is not None
    own, other = student.correlation(), teacher.correlation()
    difference = own - other
    count = len(difference)
    apart = np.abs(difference)[~np.eye(count, dtype=bool)]
    found: dict[str, Any] = {
        "classes": count,
        "mean_absolute_difference": float(apart.mean()),
        "largest_absolute_difference": float(apart.max()),
    }
    if count <= MOST:
        return found | {"student": own.round(4).tolist(), "teacher": other.round(4).tolist()}
    size = -(-count // MOST)
    return found | {"block": size, "blocks": blocks(np.abs(difference), size).round(4).tolist()}


def blocks(matrix: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The means of blocks of `size` rows and columns, the diagonal left out; 0 of nothing."""
    at = np.arange(0, len(matrix), size)
    off = 1 - np.eye(len(matrix))
    sums, counts = (
        np.add.reduceat(np.add.reduceat(values, at, 0), at, 1) for values in (matrix * off, off)
    )
    return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)


def draw(found: dict[str, Any]) -> Drawing:
    title = "Student minus teacher"
    if "blocks" in found:
        title = "Student and teacher, absolute difference"
        shown = np.array(found["blocks"])
        how = (
            f"Each square is the mean absolute difference over a block of {found['block']} x "
            f"{found['block']} classes, in the order of their numbers."
        )
    else:
        shown = np.array(found["student"]) - np.array(found["teacher"])
        how = "Rows and columns are the classes in the order of their numbers."
    most = float(np.abs(shown).max())
    words = (
        "Pearson's correlation between the logits of two classes over the validation images, "
        f"student minus teacher. Mean absolute difference over all pairs of classes: "
        f"{found['mean_absolute_difference']:.4f}, largest "
        f"{found['largest_absolute_difference']:.3f}. {how}"
    )
    body = [
        picture(0, 24, SIDE, SIDE, "png", heat(shown, most)),
        text(0, 340, f"class 0 to {found['classes'] - 1}, both ways"),
        picture(0, 350, SIDE, 10, "png", _scale("blocks" in found)),
        text(0, 374, "0" if "blocks" in found else f"{-most:.2f}"),
        *([] if "blocks" in found else [text(SIDE / 2, 374, "0", anchor="middle")]),
        text(SIDE, 374, f"{most:.2f}", anchor="end"),
    ]
    return Drawing(words, [Panel(title, 380, body)])


def heat(values: NDArray[np.float64], most: float) -> bytes:
    """A PNG with a pixel a value: 0 is transparent, +-`most` opaque, the sign is the hue."""
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.where((values > 0)[..., None], ABOVE, BELOW)
    pixels[..., 3] = np.rint(255 * np.abs(values) / (most or 1))
    Image.fromarray(pixels).save(data := io.BytesIO(), "PNG", optimize=True)
    return data.getvalue()


def _scale(above: bool) -> bytes:
    """What `heat` makes of all values, from -1 or 0 to 1, as a strip of SIDE x 10 pixels."""
    return heat(np.tile(np.linspace(0 if above else -1, 1, SIDE), (10, 1)), 1)
