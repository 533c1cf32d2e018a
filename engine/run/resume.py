"""Going on with a run: what has to be as it was, and what a reader should know of the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from ..recipe.data import Data
from ..recipe.schema import RecipeBase
from .checkpoint import Latest
from .folder import RECIPE, changes, plain, refuse
from .past import read_run

LOADERS = get_args(Data.model_fields["loader"].annotation)
FIRST = "first weights"  # of an object, at the end of the name of their digest
DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


def machine(processes: int, device: str) -> dict[str, Any]:
    """What the bytes of a run depend on beside its recipe and data."""
    return {
        "processes": processes,
        "device": device,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def check_same_run(found: Latest, sources: Mapping[str, Any], recipe: RecipeBase) -> None:
    """Raise ValueError when a checkpoint was made from other data, by other means or recipe.

    The weights that objects began with may be others by now: what came of them is in the
    checkpoint.
    """
    made_with = found.facts["sources"]
    now = {**sources, **first_weights(made_with)}
    _check(found, now, recipe, "cannot resume")


def check_returned(found: Latest, sources: Mapping[str, Any], recipe: RecipeBase) -> None:
    """Raise ValueError when the last checkpoint of a finished run was made from other data or
    objects. By what means is past."""
    made_with = found.facts["sources"]
    means = {name: made_with.get(name) for name in ("loader", "optimizer")}
    _check(found, {**sources, **means}, recipe, "cannot return the finished")


def _check(found: Latest, now: Mapping[str, Any], recipe: RecipeBase, cannot: str) -> None:
    made_with = found.facts["sources"]
    drift = [_with_cure(line, made_with) for line in changes(made_with, now)]
    refuse(
        drift,
        f"{cannot} {found.path}: it was made from other data or by other means (was -> is)",
    )
    made_by = type(recipe).model_validate(found.facts["recipe"])  # with newer settings' defaults
    drift = changes(plain(made_by), plain(recipe))
    refuse(drift, f"{cannot} {found.path}: it was made by another recipe (was -> is)")


def first_weights(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the sources that say with which weights objects began."""
    return {name: value for name, value in sources.items() if name.endswith(FIRST)}


def _with_cure(line: str, was: Mapping[str, Any]) -> str:
    """A line of what differs, digests shortened; another loader than `data.loader=auto` once stood
    for can be had."""
    line = DIGEST.sub(r"\1", line)
    if f"{FIRST}: " in line:
        return (
            f"{line} (random ones are the same each time after torch.manual_seed, or where a "
            "function of the classes makes them; resume=True takes the run as it is)"
        )
    named = line.startswith("loader: ") and was.get("loader") in LOADERS
    return f"{line} (data.loader={was['loader']} goes on as it began)" if named else line


def notes(found: Latest, now: Mapping[str, Any], sources: Mapping[str, Any]) -> list[str]:
    """For the log: damaged checkpoints passed over, and what differs on this machine, or in the
    weights that objects come with."""
    skipped = [f"skipped a damaged checkpoint: {reason}" for reason in found.skipped]
    other = changes(found.facts["machine"], now)
    differs = [f"not bit for bit as it would have been: {line}" for line in other]
    differs += [
        f"{name} are others than the run's, which goes on with its own"
        for name, value in first_weights(found.facts["sources"]).items()
        if sources.get(name) != value
    ]
    return [*skipped, *differs, f"resumed from {found.path.name}"]


def starts_again(folder: Path) -> list[str]:
    """The note of a resumed run without a checkpoint. Raises ValueError for a finished one."""
    if (folder / RECIPE).exists() and read_run(folder).finished:
        raise ValueError(
            f"cannot resume {folder}: it is finished and its checkpoints are gone; train into "
            "another folder"
        )
    return ["no checkpoint yet: it starts again"]
