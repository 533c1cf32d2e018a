"""Measures the loaders on a recipe's images, or on some made here.

Beside them stands torchvision's ImageFolder in a DataLoader. docs/results/README.md describes every
field.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ....kernels.bench.report import Record, append
from ...data.loaders import LOADERS
from ...recipe.data import Data
from ...recipe.load import load
from ...training.ranks import choose_device
from .. import options
from ..options import Parser, duration, words_of
from ..plots import plot
from ..records import read
from ..tables import drawn
from .measure import measure, opening
from .photos import made
from .sides import SPLITS
from .table import about, as_line, grid, of_loaders, panels

RECIPE = "imagenet/kd:resnet34-resnet18"
SECONDS = 20.0


def arguments(words: Sequence[str]) -> Any:
    parser = Parser(prog="kdfuse bench data", description=__doc__)
    options.of_recipes(parser, RECIPE)
    options.of_images(parser)
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, help="default: all")
    parser.add_argument("--modes", nargs="+", choices=SPLITS, help="default: both")
    parser.add_argument(
        "--seconds", type=duration, help=f"timing of a loader in a mode; default: {SECONDS}"
    )
    options.of_records(parser)
    return options.parsed(parser, words)


def main(words: Sequence[str]) -> list[str | Table]:
    """The benchmark's command line: what is to be printed, text and a table."""
    chosen = arguments(words)
    records = of_loaders(read(chosen.read, "loader", "data")) if chosen.read else run(chosen)
    if chosen.plot:
        plot(panels(records), chosen.plot)
    return ["", *about(records), "", drawn(grid(records), chosen.markdown, left=3)]


def run(chosen: Any) -> list[Record]:
    """Measures what was chosen, and writes and prints each record as it comes."""
    named, words = words_of(chosen, batch="run.batch", workers="data.workers")
    name = named or RECIPE
    recipe = load(name, words)
    data = recipe.data
    if not isinstance(data, Data):
        raise ValueError(f"{name}: its images are for detection; name a recipe of classification")
    device = choose_device(recipe.run.device)
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
        keep(opening(data, chosen.images, device.type))
        try:
            measure(
                data,
                recipe.run.batch,
                chosen.modes or list(SPLITS),
                chosen.loaders or list(LOADERS),
                SECONDS if chosen.seconds is None else chosen.seconds,
                keep,
                device,
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; without a set, --images 500 makes one") from error
    return found
