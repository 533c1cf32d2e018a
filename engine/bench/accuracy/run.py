"""Measures whether the engine reaches what a plain loop reaches, and how long each takes.

The same student, by KD or DKD, is trained by kdfuse and by the loop and the losses that
distillation repositories have, eager and in float32, once a seed (`run.seed`) each: same networks,
first weights, order and crops of the images, optimiser and rates. --runs keeps what was trained;
the same command, begun again, goes on with what is there.
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

SEEDS = 3


def arguments(words: Sequence[str]) -> Any:
    parser = Parser(prog="kdfuse bench accuracy", description=__doc__)
    options.of_recipes(parser, "none")
    parser.add_argument("--seeds", type=positive, metavar="N", help=f"default: {SEEDS}")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="default: runs/bench-accuracy")
    options.of_records(parser, drawn=None)
    return options.parsed(parser, words)


def run(chosen: Any) -> list[dict[str, Any]]:
    """Measure what was chosen: a record a side, which are kept in --out too."""
    from ....kernels.bench import report
    from ...recipe.load import Recipe
    from .measure import measured, why_not

    name, words = words_of(chosen, batch="run.batch")
    if name is None:
        raise ValueError("bench accuracy: name a recipe of kd or dkd, as in digits/kd")
    recipe = Recipe.load(name, words)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name}: a recipe of detection; classifiers are compared")
    if (why := why_not(recipe)) is not None:
        raise ValueError(f"bench accuracy: {why}")
    found, keep = keeper(chosen.out)
    facts = report.facts("cpu")
    del facts["byte_models"]  # of losses
    keep(facts | {"benchmark": "accuracy", "words": words})
    folder = chosen.runs or Path("runs/bench-accuracy")
    for record in measured(recipe, chosen.seeds or SEEDS, folder):
        keep(record)
    return found


def main(words: Sequence[str]) -> list[str | Table]:
    """The benchmark's command line: what is to be printed, tables and text."""
    from . import table

    chosen = arguments(words)
    records = read(chosen.read, "accuracy", "accuracy") if chosen.read else run(chosen)
    return table.shown(records, chosen.markdown)
