"""Trains students from a teacher that runs, and from one that was recorded."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from ....kernels.bench.report import Record
from ...cache.header import Header
from ...recipe.load import Recipe
from ...run.past import read_run
from ...training.ranks import choose_device
from ...training.recording import record
from ...training.start import train


def recipes_of(name: str, words: Sequence[str], sides: Sequence[str]) -> dict[str, Recipe]:
    """The recipe of each side. Raises ValueError for sides that are no settings of a cache."""
    found = {}
    for side in sides:
        given = [] if side == "live" else [f"cache.{word}" for word in side.split(",")]
        if strange := [word for word in given if "=" not in word]:
            raise ValueError(
                f"--sides {side}: {strange[0].removeprefix('cache.')} is neither live nor a "
                "setting, as form=sampled,draws=12"
            )
        recipe = Recipe.load(name, [*words, *given])
        if not isinstance(recipe, Recipe) or recipe.teacher is None:
            raise ValueError(
                f"{name} has no teacher to record; name a classifier's recipe with one"
            )
        if recipe.teacher.cache is not None:
            raise ValueError("teacher.cache: caches are recorded here; leave it out")
        found[side] = recipe
    return found


def measured(side: str, recipe: Recipe, seeds: int, folder: Path) -> Record:
    """The record of a side; its cache and runs lie below `folder`, used again if they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^\w.=-]+", "-", side)
    teacher = recipe.teacher
    assert teacher is not None
    found: Record = {"kind": "cache", "recipe": recipe.name, "side": side}
    found |= {"method": recipe.method.name, "student": recipe.student.name}
    found |= {"teacher": teacher.name, "device": choose_device(recipe.run.device).type}
    found |= {"epochs": recipe.run.epochs, "batch": recipe.run.batch}
    with open(folder / f"{slug}.log", "a") as log, redirect_stdout(log):
        if side != "live":
            cache = folder / f"cache-{slug}"
            print(f"{side}: recording", file=sys.stderr)
            start = time.monotonic()
            header = record(recipe, cache)
            found |= about(header) | {"record_s": round(time.monotonic() - start, 1)}
            update = {"cache": cache, "checkpoint": None}
            recipe = recipe.model_copy(update={"teacher": teacher.model_copy(update=update)})
        scores, speeds = [], []
        for seed in range(seeds):
            print(f"{side}: seed {seed}, {seed + 1} of {seeds}", file=sys.stderr)
            with_seed = recipe.run.model_copy(update={"seed": seed})
            one = recipe.model_copy(update={"run": with_seed})
            past = read_run(train(one, folder / f"{slug}-seed{seed}", "auto"))
            assert past.last is not None
            scores.append(past.last["top1"])
            speeds.append(past.images_per_s)
    found |= {"top1": scores, "mean": round(statistics.fmean(scores), 3)}
    found |= {"deviation": round(statistics.stdev(scores), 3) if seeds > 1 else None}
    known = [speed for speed in speeds if speed is not None]
    return found | {"images_per_s": statistics.median(known) if known else None}


def about(header: Header) -> Record:
    """What a cache holds, and in how many bytes."""
    row = header.form.row.itemsize
    return {
        "views": header.views,
        "images": header.steps * header.batch,
        "view_bytes": row,
        "image_bytes": row * header.views,
        "teacher_top1": header.facts.get("top1"),
    }
