"""Training from a teacher's recorded answers: whether they are those to a run's views."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import header as headers
from ..cache.fits import refusal
from ..cache.header import ELSEWHERE, Header
from ..cache.replay import Recorded
from ..cache.shards import CacheError
from ..cache.slts import RecordedSlts
from ..data.batch import Batch
from ..data.loaders import Loader
from ..data.manifest import Manifest
from ..data.plan import permutation, places
from ..data.schedule import plan_digest
from ..recipe.data import Data
from ..recipe.load import Recipe
from ..run.folder import flat
from ..run.lease import NAME as LEASE


def opened(recipe: Recipe) -> Recorded | None:
    """The cache of a recipe's teacher, None without one.

    Raises CacheError for one that is not whole, of another teacher, or in a form that one of the
    methods cannot learn from.
    """
    teacher = recipe.teacher
    if teacher is None or teacher.cache is None:
        return None
    found = Recorded(teacher.cache)
    names = found.header.teachers
    if teacher.kept is None and teacher.name not in names:
        raise CacheError(
            f"teacher.cache: {teacher.cache} has the answers of {', '.join(names)}, and "
            f"teacher.name is {teacher.name}; name the one that was recorded"
        )
    for name, learner in recipe.learners("").items():
        if learner.method.uses_teacher and (why := refusal(learner.method, found.header.form)):
            where = f"also.{name}" if name else "teacher.cache"
            raise CacheError(f"{where}: {teacher.cache}: {why}")
    return found


def opened_record(recipe: Recipe) -> RecordedSlts | None:
    """The record of a recipe's SL-Ts, None without one.

    Raises CacheError for one that is not whole, of another method, or of fewer epochs.
    """
    if recipe.slt is None or recipe.slt.record is None:
        return None
    found, run = RecordedSlts(recipe.slt.record), recipe.run
    found.check_run(recipe.method, recipe.slt.name, run.stop_epoch or run.epochs)
    return found


def planned(
    recipe: Recipe, cache: Recorded | None, record: RecordedSlts | None
) -> tuple[int, int | None]:
    """The seed of a run's plan, and the epochs after which its first views come again (None:
    never). CacheError where a cache and a record are of different views."""
    run = recipe.run
    if record is None:
        return (run.seed, None) if cache is None else (cache.header.seed, cache.header.views)
    if cache is not None:
        of_cache, of_record = cache.header.seed, record.header.seed
        if of_cache != of_record:
            raise CacheError(
                f"slt.record: {record.folder} has the views of seed {of_record}, and teacher.cache "
                f"{cache.folder} those of {of_cache}; record both under one run.seed"
            )
        epochs, again = run.stop_epoch or run.epochs, record.again or record.header.views
        if any(cache.epoch(epoch) != epoch % again for epoch in range(epochs)):
            raise CacheError(
                f"slt.record: the views of {record.folder} begin again after {again} epochs, and "
                f"those of teacher.cache {cache.folder} after {cache.header.views}; take the cache "
                "that the SL-Ts learned from, or one of as many views as there are epochs"
            )
    return record.header.seed, record.again


def begun(folder: Path, own: Header, key: str) -> bool:
    """Whether this cache is begun in the folder that `key` names. CacheError where another is."""
    if not (folder / headers.NAME).exists():
        if left := sorted({path.name for path in folder.iterdir()} - {LEASE}):
            raise CacheError(
                f"{key} = {folder}: not empty, it has {left[0]}; choose another folder"
            )
        return False
    was, now = flat(headers.read(folder).key()), flat(own.key())
    if drift := [f"{k}: {was.get(k)} -> {v}" for k, v in now.items() if was.get(k) != v]:
        lines = "\n  ".join(drift)
        raise CacheError(
            f"{key} = {folder}: another cache is there (recorded -> asked for):\n  {lines}\n"
            "undo that, or choose another folder"
        )
    return True


def out_of_use(
    images: Manifest, found: Mapping[int, str], header: Header, data: Data, epoch: int, steps: range
) -> dict[int, str]:
    """Of the rows `found` unreadable, those without which some steps of an epoch of the plan had to
    do: those planned, and those on the way from there to a readable one. Not what was found
    elsewhere, by chance of order."""
    batch, targets, bad = header.batch, images.target, {*images.bad, *found}
    order = permutation(header.seed, epoch, len(targets))
    positions = np.arange(steps.start * batch, steps.stop * batch)
    planned = order[places(positions, batch, data.repeats)]
    taken: dict[int, str] = {}
    for row in planned[np.isin(planned, list(found))].tolist():
        own = np.flatnonzero(targets == targets[row])
        start = int(np.searchsorted(own, row))
        for other in np.roll(own, -start).tolist():
            if other not in bad:
                break
            taken |= {other: found[other]} if other in found else {}
    return taken


def views_of(recipe: Recipe, images: Manifest, loader: str, seed: int) -> dict[str, Any]:
    """What decides the views of a run, as a cache's header has it."""
    data = recipe.data
    plain = {k: v for k, v in data.model_dump(mode="json").items() if k not in ELSEWHERE}
    return {
        "batch": recipe.run.batch,
        "data": plain,
        "sources": {
            "training images": images.digest,
            "plan": plan_digest(images, data, recipe.run.batch, seed),
            "loader": loader,
        },
    }


def answered(
    batches: Iterator[Batch], loader: Loader, cache: Recorded, epoch: int, start: int, part: range
) -> Iterator[Batch]:
    """The batches of an epoch from step `start`, each with the answers to its images.

    Raises CacheError for an image that can no longer be read: the answer in its place is to it.
    """
    for step, batch in enumerate(batches, start):
        if lost := loader.quarantine.found().keys() - cache.unreadable.keys():
            why = loader.quarantine.bad[row := min(lost)]
            raise CacheError(
                f"{cache.key}: {cache.folder} holds the answers to "
                f"{loader.quarantine.manifest.name(row)}, which cannot be read now ({why}); "
                "restore the file, or record a cache without it"
            )
        yield replace(batch, answers=(*batch.answers, *cache.at(epoch, step, part)))
