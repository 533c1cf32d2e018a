"""Trains students from a teacher that runs, and from one that was recorded."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ....kernels.bench.report import Record
from ...cache import header as headers
from ...cache.header import Header
from ...recipe.load import Recipe
from ...run.past import read_run
from ...training.ranks import choose_device
from ...training.recording import record
from ...training.start import train

LIVE = "live"  # the teacher, and SL-Ts, at work
SLTS = "slts"  # these are recorded as well


def recipes_of(name: str, words: Sequence[str], sides: Sequence[str]) -> dict[str, Recipe]:
    """The recipe of each side. Raises ValueError for sides that are no settings of a cache."""
    found = {}
    for side in sides:
        of_slts, given = parts_of(side)
        recipe = Recipe.load(name, [*words, *given])
        if not isinstance(recipe, Recipe) or recipe.teacher is None:
            raise ValueError(
                f"{name} has no teacher to record; name a classifier's recipe with one"
            )
        for key, there in (
            ("teacher.cache", recipe.teacher.cache),
            ("slt.record", recipe.slt and recipe.slt.record),
            ("run.record", recipe.run.record),
        ):
            if there:
                raise ValueError(f"{key}: it is recorded here; leave it out")
        if of_slts:
            _with(recipe, run={"record": Path("slts")})  # which some methods refuse
        found[side] = recipe
    return found


def parts_of(side: str) -> tuple[bool, list[str]]:
    """Whether SL-Ts are recorded as well, and the settings of a side."""
    first, *rest = side.split(",")
    if side == LIVE:
        return False, []
    words = rest if first == SLTS else [first, *rest]
    if strange := [word for word in words if "=" not in word]:
        raise ValueError(
            f"--sides {side}: {strange[0]} is neither {LIVE} nor a setting, as "
            f"form=sampled,draws=12, behind {SLTS} or not"
        )
    return first == SLTS, [f"cache.{word}" for word in words]


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
        if side != LIVE:
            print(f"{side}: recording", file=sys.stderr)
            start = time.monotonic()
            cache = folder / f"cache-{slug}"
            held = [record(recipe, cache)]
            recipe = _with(recipe, teacher={"cache": cache, "checkpoint": None, "match": "names"})
            if parts_of(side)[0]:
                place = folder / f"slts-{slug}"
                train(_with(recipe, run={"record": place}), folder / f"{slug}-recording", "auto")
                held.append(headers.read(place))
                recipe = _with(recipe, slt={"record": place})
            found |= about(held) | {"record_s": round(time.monotonic() - start, 1)}
        scores, speeds = [], []
        for seed in range(seeds):
            print(f"{side}: seed {seed}, {seed + 1} of {seeds}", file=sys.stderr)
            one = _with(recipe, run={"seed": seed})
            past = read_run(train(one, folder / f"{slug}-seed{seed}", "auto"))
            assert past.last is not None
            scores.append(past.last["top1"])
            speeds.append(past.images_per_s)
    found |= {"top1": scores, "mean": round(statistics.fmean(scores), 3)}
    found |= {"deviation": round(statistics.stdev(scores), 3) if seeds > 1 else None}
    known = [speed for speed in speeds if speed is not None]
    return found | {"images_per_s": statistics.median(known) if known else None}


def _with(recipe: Recipe, **changed: dict[str, Any]) -> Recipe:
    """The recipe with other settings in some of its sections."""
    plain = recipe.model_dump()
    return Recipe.model_validate(
        plain | {name: (plain[name] or {}) | own for name, own in changed.items()}
    )


def about(held: Sequence[Header]) -> Record:
    """What a cache, and a record where there is one, hold, and in how many bytes."""
    rows = [header.form.row.itemsize for header in held]
    return {
        "views": held[0].views,
        "images": held[0].steps * held[0].batch,
        "view_bytes": sum(rows),
        "image_bytes": sum(row * h.views for row, h in zip(rows, held, strict=True)),
        "teacher_top1": held[0].facts.get("top1"),
    }
