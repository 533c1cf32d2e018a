"""What a classifier's run reads: its sets, a process's part of them, who makes the pixels."""

from __future__ import annotations

import math

from ..data.loaders import Loader
from ..data.manifest import Manifest
from ..data.sources import open_source
from ..recipe.load import Recipe
from .peers import together
from .ranks import Group


def open_splits(recipe: Recipe, group: Group) -> tuple[Manifest, Manifest]:
    """The training and the validation set; on each machine one process goes first, it may write
    files that the others read."""

    def work() -> tuple[Manifest, Manifest]:
        return open_source(recipe.data, "train"), open_source(recipe.data, "val")

    leads = group.local_rank == 0
    doing = "reading the list of images"
    found = together(group, doing, lambda: work() if leads else None)
    return together(group, doing, lambda: found or work())


def part_of(recipe: Recipe, group: Group) -> range:
    """A process's places in each training batch.

    Raises ValueError for a batch that does not go round in pairs of mixed images and in the parts
    of run.accumulate, or not evenly where the method wants as many images of each process.
    """
    run, data = recipe.run, recipe.data
    unit = math.lcm(2 if data.mixup or data.cutmix else 1, run.accumulate)
    methods = [learner.method for learner in recipe.learners("").values()]
    if run.batch % group.world and (uneven := [m.name for m in methods if m.gathers]):
        raise ValueError(
            f"run.batch={run.batch}: method {uneven[0]} gathers as many images of each of "
            f"{group.world} processes; set it to a multiple of {group.world}"
        )
    return group.part(run.batch, "run.batch", unit)


def pixels_of(loader: Loader, val: Loader) -> str:
    """What decides the pixels of a run's batches, beside the plan: the training loader.

    For the CPU its name alone. The one for evaluation is named where its pixels are others: those
    that work with PIL show the same.
    """
    found, evaluation = maker(loader), maker(val)
    same = found == evaluation or "dali" not in (loader.name, val.name)
    return found if same else f"{found}, evaluation {evaluation}"


def maker(loader: Loader) -> str:
    """What decides the pixels of a loader's batches, beside the plan."""
    return loader.name if loader.mode == "cpu" else f"{loader.name}, decode {loader.mode}"
