"""Pictures of runs: one pass of their networks, drawn into their folders."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..recipe.load import Recipe
from ..report.pictures import make
from ..run.past import any_recipe_of


def draw(runs: list[Path], names: Collection[str]) -> None:
    """Draw the pictures of these names for each classifier among the runs; of a detector there are
    none, which its page says. Raises as `outputs` and `make` do."""
    recipes = {run: any_recipe_of(run) for run in runs}  # all of them before any is looked at
    for run, recipe in recipes.items():
        if isinstance(recipe, Recipe) and recipe.data.source == "own":
            raise ValueError(
                f"--pictures: {run} is a run of kdfuse.engine.distill, whose images and networks "
                "are objects of that program; leave the run or --pictures out"
            )
    for run in (run for run, recipe in recipes.items() if isinstance(recipe, Recipe)):
        from ..training.outputs import outputs

        print(f"{run}: {', '.join(names)}", flush=True)
        make(run, outputs(run, names), names)
