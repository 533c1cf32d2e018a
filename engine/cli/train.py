"""The verb kdfuse train: one run, or a set of several recipes and seeds."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .recipes import number, wide

if TYPE_CHECKING:
    from ..recipe.load import AnyRecipe
    from ..run.folder import Resume
    from ..run.set import Member


def train(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="names of recipes or FILE.yaml[:row], * for all rows; settings as in optim.lr=0.1",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="folder; default: runs/RECIPE-N, of a set runs/RECIPES-set-N, next N"),
    ] = None,
) -> None:
    """Train a recipe, or a set: several recipes, or several seeds with the word seeds=N.

    The word resume=true goes on with a run or a set that was stopped; resume=auto begins where
    there is none, and is what is meant under torchrun and Slurm, which may start a command again.
    """
    from ..run import job

    words = [word for word in given if "=" in word]
    default = "auto" if job.starts_again() else "false"
    resume = _take(words, "resume", default, "true|false|auto", "true, false or auto")
    seeds = int(_take(words, "seeds", "1", "[1-9][0-9]*", "a whole number above 0"))
    from ..recipe.load import load
    from ..report.tables import published
    from ..run.folder import RECIPE, default_folder
    from ..run.imports import check_imports
    from ..run.set import default_base, expand, members, train_set

    for begun in [out, *out.glob("*")] if out else []:
        if (begun / RECIPE).exists():
            check_imports(begun)  # without them the recipe may not be read at all
    names = expand(word for word in given if "=" not in word)
    one = load(names[0], words) if len(names) == 1 and seeds == 1 else None
    runs = [] if one else members(names, words, seeds)
    published(_written(runs))  # no cell has two recipes: said before anything is trained
    goes_on: Resume = "auto" if resume == "auto" else resume == "true"
    if out is None:
        folder, goes_on = _default_out(default_folder(one) if one else default_base(runs), goes_on)
    else:
        folder = out
    from ..training.start import train as run  # torchvision and DALI: not before it is known good

    try:
        if one is None:
            failures = train_set(runs, folder, goes_on, run)
        else:
            run(one, folder, goes_on)
    except KeyboardInterrupt:  # not of a step, which would have been finished
        print(f"stopped; the same with --out {folder} resume=auto goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    if one is None:
        _print_set(runs, folder, failures)
        return
    print_published(folder)
    if os.environ.get("RANK", "0") == "0":
        page = folder / "report.html"
        print(f"{folder}: see {page if page.exists() else folder / 'log.jsonl'}")


def print_published(run: Path) -> None:
    """The published number, below the ones of the run, and what of the recipe was changed."""
    from ..recipe.load import load, recipes
    from ..run.folder import RECIPE, changes, plain

    recipe = load(run / RECIPE)
    if recipe.expect is None or os.environ.get("RANK", "0") != "0":
        return
    print(f"published: {number(recipe.expect) or 'no number'} ({recipe.expect.source})")
    shipped = plain(load(recipe.name)) if recipe.name in recipes() else plain(recipe)
    drift = changes(shipped, plain(recipe))
    if drift:
        print(f"but this run is not that recipe: {'; '.join(drift)}")


def _print_set(runs: list[Member], folder: Path, failures: list[str]) -> None:
    """The tables of a set, then what does not count in them, then the runs that failed."""
    from ..report.tables import summary
    from ..run.past import below

    if os.environ.get("RANK", "0") != "0":
        return
    drawn, notes = summary(_written(runs), below(folder) if folder.exists() else [])
    for part in drawn:
        print()
        wide(part)
    for note in notes:
        print(note)
    print(f"{folder}: {len(runs) - len(failures)} of {len(runs)} runs are finished")
    if failures:
        for line in failures:
            print(f"failed: {line}", file=sys.stderr)
        raise typer.Exit(1)


def _written(runs: list[Member]) -> list[AnyRecipe]:
    """The recipes of a set, each once."""
    return list({member.written.name: member.written for member in runs}.values())


def _take(words: list[str], key: str, default: str, form: str, wants: str) -> str:
    """Take the words KEY=... out of `words`: the value of the last one, which has to fit `form`."""
    values = [word.removeprefix(f"{key}=") for word in words if word.startswith(f"{key}=")]
    words[:] = [word for word in words if not word.startswith(f"{key}=")]
    for value in values:
        if not re.fullmatch(form, value):
            raise ValueError(f"{key}: got {value}, wants {wants}")
    return values[-1] if values else default


def _default_out(base: Path, resume: Resume) -> tuple[Path, Resume]:
    """BASE-N: the next number, or the newest folder to go on with; and whether to go on there.

    With "auto" that is the newest that this command began, in this job where it is of one: an
    agent or Slurm that starts it again means the same run, and a new job begins another.
    Processes of one torchrun agree: none creates its folder before all have come this far.
    """
    from ..run import job
    from ..run.folder import begun_here

    tails = [path.name.removeprefix(f"{base.name}-") for path in base.parent.glob(f"{base.name}-*")]
    numbers = sorted(int(tail) for tail in tails if tail.isdigit())
    there = [base.with_name(f"{base.name}-{number}") for number in reversed(numbers)]
    if resume == "auto":
        nameless = job.under_torchrun() and job.name() is None
        if nameless and job.restarted():
            raise ValueError(
                "torchrun started this again, and nothing tells its job from others: name the "
                "folder with --out DIR, or the job with torchrun --rdzv-id NAME"
            )
        there = [folder for folder in there if not nameless and begun_here(folder)]
    elif resume and not there:
        raise ValueError(f"resume=true: there is no {base}-N to go on with; add --out DIR")
    if resume and there:
        return there[0], resume
    return base.with_name(f"{base.name}-{max(numbers, default=0) + 1}"), False
