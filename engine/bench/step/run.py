"""Measures training steps on synthetic batches that lie on the device: what `kdfuse train` runs.

A RECIPE alone is measured as it stands. --cases names what is measured of its networks, or of the
default pair: student (alone, cross-entropy), teacher (its forward pass alone), kd, slkd1 and slkd2
(with one and two SL-Ts), and further recipes by name. Beside each case stands a plain loop as most
repositories have it, with the same networks and images out of a DataLoader (see plain.py); with
--beside KEY=VALUE the case once more with that setting, so that it shows what pays here. Networks
have random weights unless a checkpoint is given. docs/results/README.md describes every field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .. import options
from ..options import Parser, count, duration, words_of
from ..plots import plot
from ..records import keeper, read

SECONDS = 3.0


def arguments(words: Sequence[str]) -> Any:
    parser = Parser(prog="kdfuse bench step", description=__doc__)
    options.of_recipes(parser, "that of the pair")
    options.of_steps(parser, "all of the pair")
    parser.add_argument(
        "--beside", nargs="+", action="extend", metavar="KEY=VALUE",
        help="measure each case once more, in turn with it, with these settings on top",
    )  # fmt: skip
    parser.add_argument("--seconds", type=duration, help=f"timing of a case; default: {SECONDS}")
    parser.add_argument(
        "--workers", type=count, metavar="N",
        help="of the plain loop's DataLoader; default: data.workers",
    )  # fmt: skip
    options.of_records(parser)
    chosen = options.parsed(parser, words)
    if chosen.peer == "none" and chosen.workers is not None:
        raise ValueError(f"--workers {chosen.workers}: --peer none has no loader; leave one out")
    return chosen


def run(chosen: Any) -> list[dict[str, Any]]:
    """Measure what was chosen: a record a case, which are kept in --out too."""
    from ....kernels.bench import report
    from ...training.compiled import compiling
    from ...training.process import settings
    from ...training.ranks import choose_device
    from .beside import with_words
    from .measure import measure

    recipe, words = words_of(chosen, batch="run.batch", device="run.device")
    cases = with_words(recipe, words, chosen.cases, chosen.device, chosen.beside or [])
    first = cases[0].recipe.run
    device = choose_device(first.device)
    kind = chosen.peer or "fp32"
    seconds = SECONDS if chosen.seconds is None else chosen.seconds
    found, keep = keeper(chosen.out)
    # What a process sets before its first matrix product holds for all cases.
    compiles = any(case.recipe.run.compile for case in cases)
    with settings(first), compiling(compiles) as compilations:
        facts = report.facts(device.type)
        del facts["byte_models"]  # of losses
        keep(facts | {"words": words})
        loop = None if kind == "none" else kind
        measure(cases, device, seconds, loop, chosen.workers, compilations, keep)
    return found


def main(words: Sequence[str]) -> list[str | Table]:
    """The benchmark's command line: what is to be printed, tables and text."""
    from . import table

    chosen = arguments(words)
    records = read(chosen.read, "step", "step") if chosen.read else run(chosen)
    if chosen.plot:
        plot(table.panels(records), chosen.plot)
    return table.shown(records, chosen.markdown)
