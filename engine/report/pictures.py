"""The pictures of a run by name, their files in its folder, and what a page shows of them.

Each picture is two files: NAME.json has the numbers, of which it is drawn again for a page, and
NAME.svg is the drawing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipe import problems
from ..run.disk import write_whole
from ..run.past import AP, PastRun
from . import agreement, calibration, classes, confusion, correlation, tsne
from .answers import TEACHER, Answers
from .drawing import Drawing, sheet

FOLDER = "pictures"


@dataclass(frozen=True)
class Picture:
    """How a picture is made: numbers, which JSON can hold, of answers, and a drawing of those."""

    title: str
    numbers: Callable[[Answers], dict[str, Any]]
    draw: Callable[[dict[str, Any]], Drawing]
    of_teacher: bool = False


PICTURES = {
    "tsne": Picture(tsne.TITLE, tsne.numbers, tsne.draw),
    "correlation": Picture(correlation.TITLE, correlation.numbers, correlation.draw, True),
    "confusion": Picture(confusion.TITLE, confusion.numbers, confusion.draw),
    "calibration": Picture(calibration.TITLE, calibration.numbers, calibration.draw),
    "classes": Picture(classes.TITLE, classes.numbers, classes.draw, True),
    "agreement": Picture(agreement.TITLE, agreement.numbers, agreement.draw, True),
}


@dataclass(frozen=True)
class Shown:
    """A picture on a page; one without a drawing is a note that says why."""

    title: str
    note: str
    words: str = ""
    svgs: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes that it takes on a page, rounded up."""
        return 1000 + sum(len(part.encode()) for part in (*self.svgs, self.words))


@dataclass(frozen=True)
class Album:
    """What a page has of the pictures of a run, and why it has no more."""

    shown: tuple[Shown, ...] = ()
    note: str = ""


def chosen(words: str) -> tuple[str, ...]:
    """The names that "all", "none" or a list with commas stands for; ValueError for another."""
    if words in ("all", "none"):
        return tuple(PICTURES) if words == "all" else ()
    asked = [word.strip() for word in words.split(",")]
    for word in asked:
        if word not in PICTURES:
            hint = problems.nearest(word, list(PICTURES))
            raise ValueError(
                f"--pictures: no picture {word!r}{hint} (all, none, or some of: "
                f"{','.join(PICTURES)})"
            )
    return tuple(name for name in PICTURES if name in asked)


def make(run: Path, answers: Answers, names: Collection[str]) -> None:
    """Write the pictures of these names into the run's folder, in place of older ones.

    One that needs a teacher where there is none is a file that says so. OSError names the file that
    cannot be written.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    for name in names:
        picture = PICTURES[name]
        held: dict[str, Any] = {"about": answers.about}
        drawn = folder / f"{name}.svg"
        if picture.of_teacher and TEACHER not in answers.networks:
            held["left_out"] = answers.no_teacher
            drawn.unlink(missing_ok=True)
        else:
            held["numbers"] = picture.numbers(answers)
            title = f"{run.resolve().name}: {picture.title}"
            write_whole(drawn, sheet(title, picture.draw(held["numbers"])))
        write_whole(folder / f"{name}.json", json.dumps(held, allow_nan=False) + "\n")


def albums(runs: list[PastRun], names: Collection[str] | None, room: int) -> list[Album]:
    """What a page with room for so many bytes has of each run: those of these names that were made,
    None: of all names. The files of a run that is not on it for want of room stay in its folder."""
    found = []
    for run in runs:
        if run.score == AP:
            found.append(Album(note="Pictures are of classifiers alone." if names else ""))
            continue
        wanted = PICTURES if names is None else names
        files = {name: run.path / FOLDER / f"{name}.json" for name in wanted}
        own = tuple(_read(run, name, file) for name, file in files.items() if file.is_file())
        size = sum(picture.size for picture in own)
        if size > room:
            found.append(Album(note=f"No room on this page: see {run.path / FOLDER}."))
        else:
            found.append(Album(own))
            room -= size
    return found


def _read(run: PastRun, name: str, file: Path) -> Shown:
    title = PICTURES[name].title
    # A page is also made at the end of training, which a damaged picture is no reason to fail.
    try:
        held = json.loads(file.read_bytes())
        if "left_out" in held:
            return Shown(title, f"Left out, for it needs the teacher: {held['left_out']}.")
        drawing = PICTURES[name].draw(held["numbers"])
        note = _of(run, held["about"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        again = f"draw it again with --pictures {name}"
        return Shown(title, f"{file} is damaged ({error!r}); {again}.")
    return Shown(title, note, drawing.words, tuple(panel.svg for panel in drawing.panels))


def _of(run: PastRun, about: dict[str, Any]) -> str:
    which, step = about["checkpoint"], about["step"]
    now = run.best if which == "best" else run.records[-1] if run.records else None
    since = "; the run has gone on since" if now and now["step"] != step else ""
    return f"The {which} checkpoint, of step {step}, computed on {about['device']}{since}."
