"""What a run left behind: its recipe without files, and its checkpoints."""

from pathlib import Path
from typing import Any

from ..recipe.load import Recipe
from . import checkpoint
from .folder import RECIPE


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run's folder, for its checkpoints: no files, nothing compiled.

    Raises FileNotFoundError for a folder that is no run, ValueError for a detector's.
    """
    if not (run / RECIPE).is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no {RECIPE}")
    loaded = Recipe.load(run / RECIPE)
    if not isinstance(loaded, Recipe):
        raise ValueError(f"{run} is a run of a detector; its weights are in checkpoints/")
    recipe = loaded.without_files()
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"compile": False})})


def checkpoints_of(run: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Weights and facts of the newest usable checkpoint and, once there is one, of the best."""
    last = checkpoint.latest(run / "checkpoints")
    if last is None:
        raise checkpoint.CheckpointError(f"{run}: no checkpoint yet")
    for reason in last.skipped:
        print(f"skipped a damaged checkpoint: {reason}", flush=True)
    found = {"last": (last.state, last.facts)}
    if "best" in last.facts["results"]:
        try:
            found["best"] = checkpoint.load(run / "checkpoints" / "best")
        except checkpoint.CheckpointError as error:
            print(f"without the best one: {error}", flush=True)
    return found
