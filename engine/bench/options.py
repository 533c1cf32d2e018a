"""What the command lines of the benchmarks share: options, and what they refuse."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .data.photos import CLASSES

PEERS = ("fp32", "bf16", "none")
SHOWING = ("read", "markdown", "plot")  # goes with --from


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog.removeprefix('kdfuse ')}: {message}")


def number(text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text}, wants a whole number, {least} or more")
    return int(text)


def positive(text: str) -> int:
    return number(text, 1)


def count(text: str) -> int:
    return number(text, 0)


def photos(text: str) -> int:
    return number(text, CLASSES)  # one of each


def duration(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, wants a time in seconds, 0 or more")
    return found


def picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"got {text}, wants a name that ends in .svg or .png")
    return path


def of_recipes(parser: Parser, default: str) -> None:
    """Adds the recipe, the settings, and what of it most want to change."""
    parser.add_argument(
        "given", nargs="*", metavar="RECIPE|KEY=VALUE",
        help=f"a recipe, by default {default}, and settings as in run.amp=bf16; before options "
        "that take several words",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="images of a step; default: the recipe's"
    )


def of_steps(parser: Parser, cases: str) -> None:
    """Adds which steps are measured, on what and beside what."""
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"default: {cases}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where present")
    parser.add_argument("--peer", choices=PEERS, help="the plain loop's type; default: fp32")


def of_images(parser: Parser) -> None:
    """Adds which images are read, and by how many."""
    parser.add_argument(
        "--images", type=photos, metavar="N",
        help="make N JPEGs, as large as ImageNet's or, where a recipe pads and crops, as small as "
        "its own, and read those",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=positive, metavar="N",
        help="threads, and the peer's processes; default: data.workers",
    )  # fmt: skip


def of_records(parser: Parser, drawn: str | None = "draw images/s into this .svg or .png") -> None:
    """Adds where records are kept, and how they are shown; `drawn`: what --plot does, if it is
    there."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines to this file")
    parser.add_argument(
        "--from", dest="read", nargs="+", type=Path, metavar="FILE",
        help="show the records of these files instead of measuring",
    )  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    if drawn is not None:
        parser.add_argument("--plot", type=picture, metavar="FILE", help=drawn)


def parsed(parser: Parser, words: Sequence[str]) -> Any:
    """The options. Raises ValueError for what does not fit together, and for missing files."""
    chosen = parser.parse_intermixed_args(list(words))
    for name, value in vars(chosen).items():
        if chosen.read and name not in SHOWING and value not in (None, []):
            shown = " ".join(value) if isinstance(value, list) else value
            what = "" if name == "given" else f"--{name} "
            raise ValueError(
                f"{what}{shown}: goes with measuring, and --from measures nothing; leave it out"
            )
    for path in chosen.read or []:
        if not path.is_file():
            raise ValueError(f"--from {path}: there is no such file; --out FILE makes one")
    for option in ("out", "plot"):
        path = getattr(chosen, option, None)
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"--{option} {path}: its folder is not there; make it first")
    return chosen


def words_of(chosen: Any, **keys: str) -> tuple[str | None, list[str]]:
    """The recipe that is named, and the settings; `keys`: of the options that are settings.

    Raises ValueError for several recipes, for a setting that is given twice, and for a folder of
    images beside images that are to be made.
    """
    words = [word for word in chosen.given if "=" in word]
    recipes = [word for word in chosen.given if "=" not in word]
    if len(recipes) > 1:
        raise ValueError(f"{' '.join(recipes)}: several recipes; give one")
    for option, key in keys.items():
        value = getattr(chosen, option)
        for word in words if value is not None else ():
            if word.startswith(f"{key}="):
                raise ValueError(f"--{option} {value} and {word}: give one of them")
        words += [f"{key}={value}"] if value is not None else []
    images = getattr(chosen, "images", None)  # of the benchmarks that read some
    for word in words if images is not None else ():
        if word.startswith("data.root=") and word != "data.root=null":
            raise ValueError(
                f"--images {images} and {word}: images are made or read; give one of them"
            )
    return next(iter(recipes), None), words
