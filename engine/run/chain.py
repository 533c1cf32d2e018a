"""Networks that a recipe wants trained first: teachers, assistants, SL-Ts of a second phase."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..recipe.load import AnyRecipe, Recipe
from ..recipe.run import LEFT_OPEN
from .folder import RECIPE, Resume, flat, kept_recipe

# What a run shares with those that train its teachers: where it runs, not what it computes.
SHARED = (
    "data.root",
    "data.workers",
    "data.prefetch",
    "run.device",
    "run.threads",
    "run.seed",
    "run.trackers",
)
# And how it is computed; a teacher that is there, or begun, stays with what it was begun with.
NUMERICS = ("run.speed", "run.channels_last", *(f"run.{name}" for name in LEFT_OPEN))

Train = Callable[[Recipe, Path, Resume], Path]


def trained(recipe: Recipe, runs: Path, train: Train) -> Recipe:
    """The recipe with a checkpoint for each network that has `trained_by` and none yet.

    Each is trained into a folder of its own below `runs`, named after its recipe, its words and
    the seed; a finished one is used again, an unfinished one resumed by `train(recipe, folder,
    resume)`. Raises ValueError for recipes that train each other in a circle.
    """
    return _trained(recipe, runs, train, (recipe.name,))


def _trained(recipe: Recipe, runs: Path, train: Train, way: tuple[str, ...]) -> Recipe:
    plain = recipe.model_dump()
    networks = [
        *((role, plain[role]) for role in ("student", "teacher", "slt")),
        *((f"assistants.{i}", network) for i, network in enumerate(plain["assistants"])),
        *((f"also.{n}.{r}", p[r]) for n, p in plain["also"].items() for r in ("student", "slt")),
    ]
    changed = False
    for where, network in networks:
        given = network and (
            network["checkpoint"] or network["cache"] or network["name"].startswith("run:")
        )
        if network and network["trained_by"] and not given:
            network["checkpoint"] = _one(where, network, recipe, runs, train, way)
            changed = True
    return Recipe.model_validate(plain) if changed else recipe


def _one(
    where: str,
    network: dict[str, Any],
    recipe: Recipe,
    runs: Path,
    train: Train,
    way: tuple[str, ...],
) -> Path:
    name, words = network["trained_by"], list(network["trained_with"])
    if name in way:
        raise ValueError(
            f"{where}.trained_by: {' -> '.join((*way, name))} is a circle; give a checkpoint"
        )
    shared = _words(recipe, (*SHARED, *NUMERICS))
    loaded = Recipe.load(name, [*shared, *words])
    if loaded.student.name != network["name"]:
        raise ValueError(
            f"{where}.trained_by: {name} trains a {loaded.student.name}, and {where} is a "
            f"{network['name']}"
        )
    folder = runs / "-".join(_slug(part) for part in (name, *words, f"seed{loaded.run.seed}"))
    begun = (folder / RECIPE).exists()
    if begun:
        as_begun = _words(kept_recipe(folder), NUMERICS)
        loaded = Recipe.load(name, [*shared, *as_begun, *words])
    first = _trained(loaded, runs, train, (*way, name))
    return train(first, folder, begun)


def _words(recipe: AnyRecipe, keys: tuple[str, ...]) -> list[str]:
    """The settings of a recipe as words that override another's; JSON is YAML."""
    given = flat(recipe.model_dump(mode="json"))
    return [f"{key}={json.dumps(given[key])}" for key in keys if given[key] is not None]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", text)
