"""Training, whatever a recipe is of: its folder, its task, and the loop."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ..recipe.load import AnyRecipe, DetectionRecipe, Recipe
from ..recipe.run import Run
from ..report.page import report
from ..run import job, trackers
from ..run.chain import trained
from ..run.folder import (
    CARRIED_OUT,
    RECIPE,
    Resume,
    begun,
    changes,
    check_folder,
    default_folder,
    kept_recipe,
    plain,
    refuse,
)
from ..run.past import read_run
from .classification import Classification
from .compiled import compiling
from .known import check_ahead
from .loop import Loop
from .objects import compare
from .peers import agree, from_first, named_failures, together
from .process import settings
from .ranks import Group, join
from .slt_record import check_new
from .speed import settled
from .stop import Stopped
from .task import Task

PAGE = "report.html"


def train(recipe: AnyRecipe, out: str | Path | None = None, resume: Resume | None = None) -> Path:
    """Train what the recipe says and return the run's folder (default: runs/NAME).

    Under torchrun every process calls it. With `resume`, a run that was killed goes on from its
    newest good checkpoint and ends as if it had not been killed; "auto" does so where the folder
    holds a run, leaves a finished one alone, and else begins. None is "auto" under torchrun and
    Slurm, which may start a run again, and False elsewhere.

    Raises ValueError for a folder with something in it and no `resume`, or the other way round;
    for a recipe, data or teacher other than those that the run was started with; for a teacher at
    chance level; for run.device=cuda without CUDA. Raises Diverged, a RuntimeError, when more
    steps in a row than optim.skip_limit are not finite; PeerError, another one, in all processes
    where one of them fails, is gone or differs from the first; Stopped, a SystemExit, where a
    signal or run.time_limit ended it (see stop.py).

    Networks that have `trained_by` and no checkpoint are trained first, beside the run's folder.
    What of the numerics the recipe leaves open is as `run.speed` says; the folder's recipe has it.
    """
    folder = Path(out) if out is not None else default_folder(recipe)
    group = join(recipe.run.device, recipe.run.timeout)

    def found() -> tuple[str, bool, bool]:
        auto = resume == "auto" or (resume is None and job.starts_again())
        finished = auto and (folder / RECIPE).exists() and read_run(folder).finished
        return str(folder), begun(folder) if auto else bool(resume), finished

    # As the first process sees it: others, on other machines, may see the folder as it was.
    doing = "looking at the run's folder"
    name, goes_on, finished = from_first(group, together(group, doing, found), doing)
    folder = Path(name)
    recipe = settled(recipe, group.device, _begun_as(folder) if goes_on else None)
    agree(group, "the recipe", lambda: plain(recipe))

    def look() -> None:
        if group.first:
            check_folder(folder, recipe, goes_on)
            trackers.check(recipe.run.trackers)
            if isinstance(recipe, Recipe) and not goes_on:
                check_ahead(recipe, folder.parent)
                check_new(recipe, folder)
            if (folder / RECIPE).exists():
                read_run(folder)  # whose files are whole, or the page could not be made at the end

    together(group, doing, look)
    if finished:
        if isinstance(recipe, Recipe) and recipe.data.source == "own":
            recipe = trained(recipe, folder.parent, train_once)
            with settings(recipe.run), compiling(bool(recipe.run.compile)):
                compare(open_task(recipe, group), recipe, group, folder)
        if group.first:
            print(f"{folder}: finished before, nothing is trained", flush=True)
            if not (folder / PAGE).exists():  # killed on the way to it
                _page(folder)
        group.wait()  # the first one leads the place where all of them have just agreed
        return folder
    if isinstance(recipe, Recipe):
        recipe = trained(recipe, folder.parent, train_once)
    with settings(recipe.run), compiling(bool(recipe.run.compile)) as compilations:
        loop: Loop | None = None
        with (
            named_failures(group, lambda: loop.doing if loop else "making ready"),
            closing(open_task(recipe, group)) as task,
        ):
            loop = Loop(recipe, folder, group, task, compilations)
            why = loop.run(goes_on)
            if group.first and not why:
                _page(folder)
            group.wait()
    if why:
        raise Stopped(why)
    return folder


def _page(folder: Path) -> None:
    """The run's page; it is no reason for a finished run to fail."""
    try:
        report([folder], folder / PAGE)
    except OSError as error:
        print(f"{error}; kdfuse report {folder} writes the page", flush=True)


def _begun_as(folder: Path) -> Run | None:
    """How the run of this folder was begun."""
    return kept_recipe(folder).run if (folder / RECIPE).exists() else None


def open_task(recipe: AnyRecipe, group: Group) -> Task:
    """What a recipe trains, ready for the first step."""
    if isinstance(recipe, DetectionRecipe):
        from ..detection.task import Detection  # no other run needs what it imports

        return Detection(recipe, group)
    return Classification(recipe, group)


def train_once(recipe: Recipe, folder: Path, resume: Resume) -> Path:
    """Train, unless the folder holds the finished run of the same recipe."""
    if resume and read_run(folder).finished:
        was, now = plain(kept_recipe(folder)), plain(recipe)
        drift = changes({k: now.get(k, v) if k in CARRIED_OUT else v for k, v in was.items()}, now)
        refuse(drift, f"cannot use {folder} as it was trained before: its recipe is another")
        return folder
    return train(recipe, folder, resume)
