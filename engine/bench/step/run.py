"""Measures training steps on synthetic batches that lie on the device: what `kdfuse train` runs.

A RECIPE alone is measured as it stands. --cases names what is measured of its networks, or of the
default pair: student (alone, cross-entropy), teacher (its forward pass alone), kd, slkd1 and slkd2
(with one and two SL-Ts), and further recipes by name. Beside each case stands a plain loop as most
repositories have it, with the same networks and images out of a DataLoader (see plain.py). Networks
have random weights unless a checkpoint is given. docs/results/README.md describes every field.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.table import Table

from ..records import read

PEERS = ("fp32", "bf16", "none")
DEFAULTS: dict[str, Any] = {"seconds": 3.0, "peer": "fp32"}


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


def duration(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, wants a time in seconds, 0 or more")
    return found


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="kdfuse bench step", description=__doc__)
    parser.add_argument(
        "given", nargs="*", metavar="RECIPE|KEY=VALUE",
        help="a recipe, and settings of all cases as in run.amp=bf16, before the options",
    )  # fmt: skip
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="default: all of the pair")
    parser.add_argument("--batch", type=positive, help="images of a step; default: the recipe's")
    parser.add_argument("--seconds", type=duration, help="timing of a case, about; default: 3")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where present")
    parser.add_argument("--peer", choices=PEERS, help="the plain loop's type; default: fp32")
    parser.add_argument(
        "--workers", type=count, help="of the plain loop's DataLoader; default: data.workers"
    )
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument(
        "--from", dest="read", nargs="+", type=Path, metavar="FILE",
        help="show the records of these files instead of measuring",
    )  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    chosen = parser.parse_args(list(words))
    check(chosen, "batch", "seconds", "device", "peer", "workers", "out", "cases", "given")
    if chosen.peer == "none" and chosen.workers is not None:
        raise ValueError(f"--workers {chosen.workers}: --peer none has no loader; leave one out")
    return chosen


def check(chosen: argparse.Namespace, *measuring: str) -> None:
    """Refuse what does not fit together, and what cannot be written or read; `measuring`: what
    goes with measuring alone."""
    for name in measuring:
        value = getattr(chosen, name)
        if chosen.read and value not in (None, []):
            shown = " ".join(value) if isinstance(value, list) else value
            what = "" if name == "given" else f"--{name} "
            raise ValueError(
                f"{what}{shown}: goes with measuring, and --from measures nothing; leave it out"
            )
    for path in chosen.read or []:
        if not path.is_file():
            raise ValueError(f"--from {path}: there is no such file; --out FILE makes one")
    if chosen.out and not chosen.out.absolute().parent.is_dir():
        raise ValueError(f"--out {chosen.out}: its folder is not there; make it first")
    recipes = [word for word in chosen.given if "=" not in word]
    if len(recipes) > 1:
        raise ValueError(
            f"{' '.join(recipes)}: several recipes; give one, and the others after --cases"
        )


def words_of(chosen: argparse.Namespace, **keys: str) -> tuple[str | None, list[str]]:
    """The recipe that is named, and the settings of all cases; `keys`: of options that are some."""
    words = [word for word in chosen.given if "=" in word]
    recipe = next((word for word in chosen.given if "=" not in word), None)
    for option, key in keys.items():
        value = getattr(chosen, option)
        for word in words if value is not None else ():
            if word.startswith(f"{key}="):
                raise ValueError(f"--{option} {value} and {word}: give one of them")
        words += [f"{key}={value}"] if value is not None else []
    return recipe, words


def run(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what was chosen: a record a case, which are kept in --out too."""
    from ....kernels.bench import report
    from ...training.compiled import compiling
    from ...training.process import settings
    from ...training.ranks import choose_device
    from .cases import chosen as chosen_cases
    from .measure import measure

    recipe, words = words_of(chosen, batch="run.batch", device="run.device")
    cases = chosen_cases(recipe, words, chosen.cases, chosen.device)
    first = cases[0].recipe.run
    device = choose_device(first.device)
    kind = DEFAULTS["peer"] if chosen.peer is None else chosen.peer
    seconds = DEFAULTS["seconds"] if chosen.seconds is None else chosen.seconds
    found: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        found.append(record)
        if chosen.out:
            report.append(chosen.out, record)

    # What a process sets before its first matrix product holds for all cases.
    with settings(first), compiling(any(case.recipe.run.compile for case in cases)):
        facts = report.facts(device.type)
        del facts["byte_models"]  # of losses
        keep(facts | {"words": words})
        measure(cases, device, seconds, None if kind == "none" else kind, chosen.workers, keep)
    return found


def main(words: Sequence[str]) -> list[str | Table]:
    """The benchmark's command line: what is to be printed, tables and text."""
    from . import table

    chosen = arguments(words)
    records = read(chosen.read, "step", "step") if chosen.read else run(chosen)
    return table.shown(records, chosen.markdown)
