"""The accuracy of each class beside the teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .drawing import KINDS, WIDTH, Drawing, Panel, frame, line, places, short, text

if TYPE_CHECKING:
    from .answers import Answers

TITLE = "Accuracy of each class, student and teacher"
MOST = 30  # classes that are named


def accuracies(
    target: NDArray[np.int64], top1: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """(C,) percent; NaN for a class without images."""
    right = np.bincount(target[top1 == target], minlength=classes)
    with np.errstate(invalid="ignore"):
        return 100 * right / np.bincount(target, minlength=classes)


def numbers(answers: Answers) -> dict[str, Any]:
    """Name, images, the student's and the teacher's top-1 of each class that has images."""
    count = len(answers.classes)
    student, teacher = (
        accuracies(answers.target, answers.networks[name].top1, count)
        for name in ("student", "teacher")
    )
    images = np.bincount(answers.target, minlength=count)
    each = zip(answers.classes, images.tolist(), student.tolist(), teacher.tolist(), strict=True)
    return {
        "classes": [
            {"name": name, "images": n, "student": own, "teacher": other}
            for name, n, own, other in each
            if n
        ]
    }


def draw(found: dict[str, Any]) -> Drawing:
    classes = found["classes"]
    by_gain = sorted(classes, key=lambda c: c["student"] - c["teacher"])
    better = sum(c["student"] > c["teacher"] for c in classes)
    worse = sum(c["student"] < c["teacher"] for c in classes)
    named, which = by_gain, "All of them by name"
    if len(classes) > MOST:
        named = [*by_gain[: MOST // 2], *by_gain[-MOST // 2 :]]
        which = f"By name the {MOST // 2} where the student is furthest behind and ahead"
    words = (
        f"Of {len(classes)} classes the student is better than its teacher in {better}, worse in "
        f"{worse}. In the square each class is a dot, above the line where the student is better; "
        f"dots may cover each other. {which}: student blue, teacher an orange triangle."
    )
    return Drawing(words, [_dots(classes), _names(named)])


def _dots(classes: list[dict[str, Any]]) -> Panel:
    left, top, side = 34, 28, 262
    foot = top + side
    body = [frame(left, top, side, side), line(left, foot, left + side, top, "soft", dashed=True)]
    points = [(left + side * c["teacher"] / 100, foot - side * c["student"] / 100) for c in classes]
    body.append(places(points, 0, 6, opacity=0.7))
    for tick in (0, 50, 100):
        body.append(text(left - 5, foot - side * tick / 100 + 4, str(tick), anchor="end"))
        body.append(text(left + side * tick / 100, foot + 14, str(tick), anchor="middle"))
    body += [
        text(10, top + side / 2, "student, percent", anchor="middle", turned=True),
        text(left + side / 2, foot + 30, "teacher, percent", anchor="middle"),
    ]
    return Panel("Student over teacher", foot + 36, body)


def _names(classes: list[dict[str, Any]]) -> Panel:
    left, right, row = 96, WIDTH - 46, 16
    body, y = [], 34
    students, teachers = [], []
    for c in classes:
        own, other = (left + (right - left) * c[who] / 100 for who in ("student", "teacher"))
        body.append(text(left - 10, y + 4, short(c["name"], 13), anchor="end"))
        body.append(line(left, y, right, y))
        body.append(line(own, y, other, y, "soft"))
        gain = f"{c['student'] - c['teacher']:+.1f}"
        body.append(text(WIDTH, y + 4, gain, anchor="end"))
        students.append((own, y))
        teachers.append((other, y))
        y += row
    body += [places(teachers, 2 * KINDS + 1, 8), places(students, 0, 7)]
    body += [text(left, y + 6, "0", anchor="middle"), text(right, y + 6, "100", anchor="middle")]
    return Panel("Student minus teacher, points", y + 14, body)
