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
from ..data.photos import CLASSES, made
from ..records import read
from ..step.cases import chosen as chosen_cases
from ..step.run import PEERS, Parser, check, duration, number, positive, words_of

SECONDS = 10.0


def photos(text: str) -> int:
    return number(text, CLASSES)


def arguments(words: Sequence[str]) -> Any:
    parser = Parser(prog="kdfuse bench e2e", description=__doc__)
    parser.add_argument(
        "given", nargs="*", metavar="RECIPE|KEY=VALUE",
        help="a recipe, and settings of all cases as in run.amp=bf16, before the options",
    )  # fmt: skip
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: kd, or the recipe")
    parser.add_argument(
        "--images", type=photos, metavar="N",
        help="make N JPEGs, of ImageNet's size or where a recipe pads and crops as small as its "
        "own, and read those",
    )  # fmt: skip
    parser.add_argument(
        "--loader", choices=LOADERS, help="default: the recipe's; of made images the one for files"
    )
    parser.add_argument("--batch", type=positive, help="images of a step; default: the recipe's")
    parser.add_argument("--seconds", type=duration, help="timing of a side, about; default: 10")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where present")
    parser.add_argument("--peer", choices=PEERS, help="the plain loop's type; default: fp32")
    parser.add_argument(
        "--workers", type=positive, help="threads, and the peer's processes; default: data.workers"
    )
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument(
        "--from", dest="read", nargs="+", type=Path, metavar="FILE",
        help="show the records of these files instead of measuring",
    )  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    found = parser.parse_args(list(words))
    check(
        found,
        "images",
        "loader",
        "batch",
        "seconds",
        "device",
        "peer",
        "workers",
        "out",
        "cases",
        "given",
    )
    return found


def run(chosen: Any) -> list[Record]:
    """Measure what was chosen: a record a case, which are kept in --out too."""
    from ....kernels.bench import report
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
    found: list[Record] = []

    def keep(record: Record) -> None:
        found.append(record)
        if chosen.out:
            report.append(chosen.out, record)

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
    return table.shown(records, chosen.markdown)
