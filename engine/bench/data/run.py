"""kdfuse bench data: its options, and the run."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ....kernels.bench.report import Record, append, in_markdown
from ...data.loaders import LOADERS
from ...recipe.data import Data
from ...recipe.load import load
from ..records import read
from .measure import measure, opening
from .photos import CLASSES, made
from .sides import SPLITS
from .table import about, as_line, grid, of_loaders

RECIPE = "imagenet/kd:resnet34-resnet18"
SECONDS = 20.0
MEASURING = ("images", "loaders", "modes", "batch", "seconds", "workers", "out")


def whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def photos(text: str) -> int:
    number = whole(text)
    if number < CLASSES:
        raise argparse.ArgumentTypeError(f"{text} does not fill {CLASSES} classes; give more")
    return number


def duration(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no length of time in seconds")
    return number


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kdfuse bench data",
        description="Time the loaders on a recipe's images, or on some made here, beside "
        "torchvision's ImageFolder in a DataLoader.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="[RECIPE] [KEY=VALUE ...]",
        help=f"as for kdfuse train; default: {RECIPE}",
    )  # fmt: skip
    how = parser.add_argument_group("what is measured")
    how.add_argument("--images", type=photos, metavar="N",
                     help="make N JPEGs as large as ImageNet's and read those")  # fmt: skip
    how.add_argument("--loaders", nargs="+", choices=LOADERS, help="default: all")
    how.add_argument("--modes", nargs="+", choices=SPLITS, help="default: both")
    how.add_argument("--batch", type=whole, metavar="N", help="default: run.batch")
    how.add_argument("--workers", type=whole, metavar="N",
                     help="threads, and the peer's processes; default: data.workers")  # fmt: skip
    how.add_argument("--seconds", type=duration, metavar="S",
                     help=f"timing of a loader in a mode; default: {SECONDS:.0f}")  # fmt: skip
    how.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines, as they come")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--from", dest="read", nargs="+", type=Path, metavar="FILE",
                       help="show the records of these files instead of measuring")  # fmt: skip
    shown.add_argument("--markdown", action="store_true", help="print a Markdown table")
    chosen = parser.parse_intermixed_args(words)
    if chosen.read:
        for name in MEASURING:
            if getattr(chosen, name) is not None:
                parser.error(f"--{name} goes with measuring, --from measures nothing")
        if chosen.words:
            parser.error(f"{' '.join(chosen.words)}: --from measures nothing; leave it out")
    for path in chosen.read or []:
        if not path.is_file():
            parser.error(f"--from {path}: there is no such file")
    if chosen.out and not chosen.out.absolute().parent.is_dir():
        parser.error(f"--out {chosen.out}: there is no folder {chosen.out.parent}")
    return chosen


def main(words: list[str]) -> list[str | Table]:
    """The benchmark's command line: what is to be printed, text and a table."""
    chosen = arguments(words)
    records = of_loaders(read(chosen.read, "loader", "data")) if chosen.read else run(chosen)
    heads, *rows = table = grid(records)
    found: list[str | Table] = ["", *about(records), ""]
    if chosen.markdown:
        return [*found, in_markdown(table)]
    drawn = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        drawn.add_row(*map(Text, row))
    return [*found, drawn]


def run(chosen: argparse.Namespace) -> list[Record]:
    """Measures what was chosen, and writes and prints each record as it comes."""
    own = chosen.words and "=" not in chosen.words[0]
    name, words = (chosen.words[0], chosen.words[1:]) if own else (RECIPE, chosen.words)
    recipe = load(name, words)
    data = recipe.data
    if not isinstance(data, Data):
        raise ValueError(f"{name}: its images are for detection; name a recipe of classification")
    if chosen.workers is not None:
        data = data.model_copy(update={"workers": chosen.workers})
    found: list[Record] = []

    def keep(record: Record) -> None:
        if chosen.out:
            append(chosen.out, record)
        if record["kind"] != "facts":
            found.append(record)
            print(as_line(record), flush=True)

    with tempfile.TemporaryDirectory(prefix="kdfuse-photos-") as folder:
        if chosen.images is not None:
            print(f"making {chosen.images} images", file=sys.stderr)
            data = made(data, Path(folder), chosen.images)
        keep(opening(data, chosen.images))
        try:
            measure(
                data,
                chosen.batch or recipe.run.batch,
                chosen.modes or list(SPLITS),
                chosen.loaders or list(LOADERS),
                chosen.seconds or SECONDS,
                keep,
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; without a set, --images 500 makes one") from error
    return found
