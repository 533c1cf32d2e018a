"""A set of runs: several recipes and seeds, trained one after the other into one folder."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from ..recipe import problems, yamlfile
from ..recipe.load import Recipe, recipes
from ..recipe.schema import RecipeError
from ..report.tables import published
from .folder import RECIPE, check_folder, occupied, one_word
from .past import read_run


@dataclass(frozen=True)
class Member:
    """One run of a set."""

    written: Recipe  # before the words of the command line, where it is whole without them
    recipe: Recipe
    folder: str  # within the set's folder


def expand(names: Iterable[str]) -> list[str]:
    """The recipes of several names, each once; `*` and `?` stand for parts of names or rows.

    `cifar100/slkd:*` is every row of that file, `mine.yaml:*` of a file of one's own. Raises
    RecipeError for a pattern without a match, and for no name at all.
    """
    found: dict[str, None] = {}
    for name in names:
        file, _, rows = name.rpartition(":")
        if not set("*?") & set(name):
            found[name] = None
            continue
        if file.endswith((".yaml", ".yml")):
            known = [f"{file}:{row}" for row in yamlfile.read(Path(file)).get("rows") or ()]
            matching = [one for one in known if fnmatchcase(one.rpartition(":")[2], rows)]
        else:
            matching = [one for one in recipes() if fnmatchcase(one, name)]
        if not matching:
            raise RecipeError(f"no recipe matches {name}; kdfuse recipes lists them")
        found |= dict.fromkeys(matching)
    if not found:
        raise RecipeError("no recipe is named; kdfuse recipes lists them")
    return list(found)


def members(names: Iterable[str], words: list[str], seeds: int) -> list[Member]:
    """The runs of a set: every recipe with the seeds run.seed ... run.seed + seeds - 1.

    Raises RecipeError, one problem a line with its recipe's name, and ValueError where two recipes
    claim one cell of a published table: before anything is trained.
    """
    found: list[Member] = []
    wrong: list[str] = []
    for name in names:
        try:
            start = Recipe.load(name, words)
            if not isinstance(start, Recipe):
                raise RecipeError("detectors are trained one at a time, without seeds=")
            for seed in range(start.run.seed, start.run.seed + seeds):
                recipe = Recipe.load(name, [*words, f"run.seed={seed}"])
                folder = one_word(f"{recipe.name}-seed{seed}")
                found.append(Member(_written(name, start), recipe, folder))
        except RecipeError as error:
            wrong += [f"{name}: {line}" for line in str(error).splitlines()]
    for folder, count in Counter(member.folder for member in found).items():
        if count > 1:
            wrong.append(f"{folder}: the folder of {count} runs; rename a recipe's file or row")
    if wrong:
        raise RecipeError("\n".join(wrong))
    published({run.written.name: run.written for run in found}.values())
    return found


def default_base(runs: list[Member]) -> Path:
    """runs/NAME-set: NAME is what the recipes' names begin with, cifar100-slkd for rows of it."""
    parts = [re.split(r"[/:]", run.recipe.name) for run in runs]
    shared = os.path.commonprefix(parts) or ["recipes"]
    return Path("runs") / one_word(f"{'-'.join(shared)}-set")


def train_set(runs: list[Member], folder: Path, resume: bool) -> list[str]:
    """Train the runs into `folder`, one subfolder each; a line for each run that failed.

    A run that fails does not stop the next. Under torchrun it does, because the other processes
    may be waiting for this one in the middle of a step: its error is raised. With `resume`,
    finished runs are left alone, unfinished ones go on, and runs that were not there start. Raises
    ValueError for a folder with something in it and no `resume`, or that is a single run.
    """
    if occupied(folder):
        if (folder / RECIPE).exists():
            raise ValueError(f"out = {folder}: a single run, not a set; choose another folder")
        if not resume:
            raise ValueError(
                f"out = {folder}: not empty; choose another folder, or resume=true to go on with "
                "the set"
            )
    done = [_finished(folder / run.folder) for run in runs]  # before any process writes
    from ..training.start import train

    failures = []
    for number, (run, finished) in enumerate(zip(runs, done, strict=True), 1):
        out = folder / run.folder
        if os.environ.get("RANK", "0") == "0":
            state = ": finished before" if finished else ""
            print(f"\n[{number}/{len(runs)}] {out}{state}", flush=True)
        try:
            if finished:
                check_folder(out, run.recipe, resume=True)
            else:
                train(run.recipe, out=out, resume=resume)
        except Exception as error:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise
            failures.append(f"{out}: {error}")
            print(f"failed: {error}", file=sys.stderr, flush=True)
            if not problems.for_users(error):
                traceback.print_exc()
        finally:
            if run.recipe.run.compile:
                torch.compiler.reset()  # its limit of recompilations counts over the process
    return failures


def _written(name: str, loaded: Recipe) -> Recipe:
    try:
        return Recipe.load(name)
    except RecipeError:  # the words give what the file leaves out
        return loaded


def _finished(run: Path) -> bool:
    return (run / RECIPE).exists() and read_run(run).finished
