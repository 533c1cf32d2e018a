"""Measures training from image files end to end: loader and step as `kdfuse train` has them.

Beside both stand the step alone, on synthetic batches, the loader alone, and the loop of most
repositories with ImageFolder in a DataLoader. RECIPE and --cases are those of kdfuse bench step, by
default KD of its pair. docs/results/README.md describes every field.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ....kernels.bench.report import Record
from ...data.loaders import LOADERS
from ...recipe.data import Data
from .. import options
from ..data.photos import made
from ..options import Parser, duration, words_of
from ..plots import plot
from ..records import keeper, read
from ..step.cases import chosen as chosen_cases

SECONDS = 10.0


def arguments(words: Sequence[str]) -> Any:
    parser = Parser(prog="kdfuse bench e2e", description=__doc__)
    options.of_recipes(parser, "that of the pair")
    options.of_steps(parser, "kd, or the recipe")
    options.of_images(parser)
    parser.add_argument(
        "--loader", choices=LOADERS, help="default: the recipe's; of made images data.loader=auto"
    )
    parser.add_argument("--seconds", type=duration, help=f"timing of a side; default: {SECONDS}")
    options.of_records(parser)
    return options.parsed(parser, words)


def run(chosen: Any) -> list[Record]:
    """Measure what was chosen: a record a case, which are kept in --out too."""
    from ...training.compiled import compiling
    from ...training.process import settings
    from ...training.ranks import choose_device
    from ..data.measure import opening
    from ..step.measure import allow_graphs
    from .measure import measure

    recipe, words = words_of(chosen, batch="run.batch", device="run.device", workers="data.workers")
    names = chosen.cases or ([recipe] if recipe else ["kd"])
    cases = chosen_cases(recipe, words, names, chosen.device)
    for case in cases:
        if case.forward:
            raise ValueError(f"--cases {case.name}: it trains nothing; leave it out")
    first = cases[0].recipe.run
    device = choose_device(first.device)
    found, keep = keeper(chosen.out)
    with (
        tempfile.TemporaryDirectory(prefix="kdfuse-photos-") as folder,
        settings(first),
        compiling(any(case.recipe.run.compile for case in cases)),
    ):
        if first.compile:
            allow_graphs(cases)
        sets = [(case, case.recipe.data) for case in cases]
        if chosen.images is not None:
            print(f"making {chosen.images} images", file=sys.stderr)
            sets = [(case, made(data, Path(folder), chosen.images)) for case, data in sets]
        if chosen.loader is not None:
            sets = [(case, with_loader(data, chosen.loader)) for case, data in sets]
        facts = opening(sets[0][1], chosen.images, device.type)
        keep(facts | {"benchmark": "e2e", "words": words})
        kind = chosen.peer or "fp32"
        seconds = SECONDS if chosen.seconds is None else chosen.seconds
        try:
            measure(sets, device, seconds, None if kind == "none" else kind, keep)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; without a set, --images 500 makes one") from error
    return found


def with_loader(data: Data, name: str) -> Data:
    return Data.model_validate(data.model_dump() | {"loader": name})


def main(words: Sequence[str]) -> list[str | Table]:
    """The benchmark's command line: what is to be printed, tables and text."""
    from . import table

    chosen = arguments(words)
    records = read(chosen.read, "e2e", "e2e") if chosen.read else run(chosen)
    if chosen.plot:
        plot(table.panels(records), chosen.plot)
    return table.shown(records, chosen.markdown)
