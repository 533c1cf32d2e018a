"""A set of runs: several recipes and seeds, trained one after the other into one folder."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..recipe import problems, yamlfile
from ..recipe.load import AnyRecipe, load, recipes
from ..recipe.schema import RecipeError
from .folder import RECIPE, Resume, check_folder, nothing_there, occupied, one_word
from .past import read_run

Train = Callable[[AnyRecipe, Path, Resume], Path]


@dataclass(frozen=True)
class Member:
    """One run of a set."""

    written: AnyRecipe  # before the words of the command line, where it is whole without them
    recipe: AnyRecipe
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

    Raises RecipeError, one problem a line with its recipe's name, before anything is trained.
    """
    found: list[Member] = []
    wrong: list[str] = []
    for name in names:
        try:
            start = load(name, words)
            for seed in range(start.run.seed, start.run.seed + seeds):
                recipe = load(name, [*words, f"run.seed={seed}"])
                folder = one_word(f"{recipe.name}-seed{seed}")
                found.append(Member(_written(name, start), recipe, folder))
        except RecipeError as error:
            wrong += [f"{name}: {line}" for line in str(error).splitlines()]
    for folder, count in Counter(member.folder for member in found).items():
        if count > 1:
            wrong.append(f"{folder}: the folder of {count} runs; rename a recipe's file or row")
    if wrong:
        raise RecipeError("\n".join(wrong))
    return found


def default_base(runs: list[Member]) -> Path:
    """runs/NAME-set: NAME is what the recipes' names begin with, cifar100-slkd for rows of it."""
    parts = [re.split(r"[/:]", run.recipe.name) for run in runs]
    shared = os.path.commonprefix(parts) or ["recipes"]
    return Path("runs") / one_word(f"{'-'.join(shared)}-set")


def train_set(runs: list[Member], folder: Path, resume: Resume, train: Train) -> list[str]:
    """Train the runs into `folder`, one subfolder each; a line for each run that failed.

    `train(recipe, folder, resume)` trains one. A run that fails does not stop the next; under
    torchrun it does, because the other processes may be waiting for this one in the middle of a
    step: its error is raised. With `resume`, finished runs are left alone, unfinished ones go on,
    and runs that were not there start. Raises ValueError, before anything is trained, for a folder
    with something in it and no `resume`, for an empty one with True, for one that is a single run,
    and where runs in it were trained by another recipe.
    """
    if occupied(folder):
        if (folder / RECIPE).exists():
            raise ValueError(f"out = {folder}: a single run, not a set; choose another folder")
        if not resume:
            raise ValueError(
                f"out = {folder}: not empty; choose another folder, or resume=true to go on with "
                "the set"
            )
    elif resume is True:
        raise nothing_there(folder)
    others = [line for run in runs if (line := _of_another_recipe(folder / run.folder, run.recipe))]
    if others:
        raise ValueError("\n".join(others))
    done = [_finished(folder / run.folder) for run in runs]  # before any process writes
    failures = []
    for number, (run, finished) in enumerate(zip(runs, done, strict=True), 1):
        out = folder / run.folder
        if os.environ.get("RANK", "0") == "0":
            state = ": finished before" if finished else ""
            print(f"\n[{number}/{len(runs)}] {out}{state}", flush=True)
        try:
            if not finished:
                train(run.recipe, out, resume and "auto")
        except Exception as error:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise
            failures.append(f"{out}: {error}")
            print(f"failed: {error}", file=sys.stderr, flush=True)
            if not problems.for_users(error):
                traceback.print_exc()
    return failures


def _written(name: str, loaded: AnyRecipe) -> AnyRecipe:
    try:
        return load(name)
    except RecipeError:  # the words give what the file leaves out
        return loaded


def _of_another_recipe(run: Path, recipe: AnyRecipe) -> str:
    if not (run / RECIPE).exists():
        return ""
    try:
        check_folder(run, recipe, resume=True)
    except ValueError as error:
        return f"{run}: {error}"
    return ""


def _finished(run: Path) -> bool:
    return (run / RECIPE).exists() and read_run(run).finished
