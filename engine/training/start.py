"""Training, whatever a recipe is of: its folder, its task, and the loop."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ..recipe.load import AnyRecipe, DetectionRecipe, Recipe, load
from ..recipe.run import Run
from ..run.chain import trained
from ..run.folder import CARRIED_OUT, RECIPE, changes, check_folder, default_folder, plain, refuse
from ..run.past import read_run
from .classification import Classification
from .compiled import compiling
from .loop import Loop
from .peers import agree, named_failures, together
from .process import settings
from .ranks import Group, join
from .speed import settled
from .task import Task


def train(recipe: AnyRecipe, out: str | Path | None = None, resume: bool = False) -> Path:
    """Train what the recipe says and return the run's folder (default: runs/NAME).

    Under torchrun every process calls it. With `resume`, a run that was killed goes on from its
    newest good checkpoint and ends as if it had not been killed. Raises ValueError for a folder
    with something in it and no `resume`; for a recipe, data or teacher other than those that the
    run was started with; for a teacher at chance level; for run.device=cuda without CUDA.
    Raises Diverged, a RuntimeError, when a loss is not finite; PeerError, another one, in all
    processes where one of them fails, is gone or differs from the first.

    Networks that have `trained_by` and no checkpoint are trained first, beside the run's folder.
    What of the numerics the recipe leaves open is as `run.speed` says; the folder's recipe has it.
    """
    folder = Path(out) if out is not None else default_folder(recipe)
    group = join(recipe.run.device, recipe.run.timeout)
    recipe = settled(recipe, group.device, _begun(folder) if resume else None)
    agree(group, "the recipe", lambda: plain(recipe))
    if isinstance(recipe, Recipe):
        recipe = trained(recipe, folder.parent, _train_once)

    def look() -> None:
        if group.first:
            check_folder(folder, recipe, resume)

    together(group, "looking at the run's folder", look)
    with settings(recipe.run), compiling(bool(recipe.run.compile)) as compilations:
        loop: Loop | None = None
        with (
            named_failures(group, lambda: loop.doing if loop else "making ready"),
            closing(open_task(recipe, group)) as task,
        ):
            loop = Loop(recipe, folder, group, task, compilations)
            loop.run(resume)
            group.wait()
    return folder


def _begun(folder: Path) -> Run | None:
    """How the run of this folder was begun."""
    return load(folder / RECIPE).run if (folder / RECIPE).exists() else None


def open_task(recipe: AnyRecipe, group: Group) -> Task:
    """What a recipe trains, ready for the first step."""
    if isinstance(recipe, DetectionRecipe):
        from ..detection.task import Detection  # no other run needs what it imports

        return Detection(recipe, group)
    return Classification(recipe, group)


def _train_once(recipe: Recipe, folder: Path, resume: bool) -> Path:
    """Train, unless the folder holds the finished run of the same recipe."""
    if resume and read_run(folder).finished:
        was, now = plain(Recipe.load(folder / RECIPE)), plain(recipe)
        drift = changes({k: now.get(k, v) if k in CARRIED_OUT else v for k, v in was.items()}, now)
        refuse(drift, f"cannot use {folder} as it was trained before: its recipe is another")
        return folder
    return train(recipe, folder, resume)
