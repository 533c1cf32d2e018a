"""Measures what recorded teachers are worth: the accuracy of students that learn from them.

Each of --sides trains as many students as --seeds says: "live" with the teacher itself at work,
any other from a cache with those settings, as in form=sampled,draws=12,views=4. With "slts" before
them, as in slts,number=int8, a run of SLKD records its self-learning teachers in that form, and the
students learn from both. --runs keeps networks, caches and records; the same command, begun again,
goes on with what is there.
docs/results/README.md describes every field.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import options
from ..options import Parser, positive, words_of
from ..records import keeper, read
from .plot import plot

SEEDS = 3
SIDES = ("live", "form=full,number=float16", "form=full,number=int8")


def arguments(words: Sequence[str]) -> Any:
    parser = Parser(prog="kdfuse bench cache", description=__doc__)
    options.of_recipes(parser, "none")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help=f"default: {' '.join(SIDES)}")
    parser.add_argument("--seeds", type=positive, metavar="N", help=f"of a side; default: {SEEDS}")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="default: runs/bench-cache")
    options.of_records(parser, "draw top-1 over bytes into this .svg or .png")
    return options.parsed(parser, words)


def run(chosen: Any) -> list[dict[str, Any]]:
    """Measure what was chosen: a record a side, which are kept in --out too."""
    from ....kernels.bench import report
    from .measure import measured, recipes_of

    recipe, words = words_of(chosen, batch="run.batch")
    if recipe is None:
        raise ValueError("bench cache: name a recipe with a teacher, as in digits/kd")
    sides = recipes_of(recipe, words, chosen.sides or SIDES)
    found, keep = keeper(chosen.out)
    facts = report.facts("cpu")
    del facts["byte_models"]  # of losses
    keep(facts | {"benchmark": "cache", "words": words})
    folder = chosen.runs or Path("runs/bench-cache")
    for side, loaded in sides.items():
        keep(measured(side, loaded, chosen.seeds or SEEDS, folder))
    return found


def main(words: Sequence[str]) -> list[str | Table]:
    """The benchmark's command line: what is to be printed, tables and text."""
    from . import table

    chosen = arguments(words)
    records = read(chosen.read, "cache", "cache") if chosen.read else run(chosen)
    if chosen.plot:
        plot(records, chosen.plot)
    return table.shown(records, chosen.markdown)
