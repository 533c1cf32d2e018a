"""Training from a teacher's recorded answers: whether they are those to a run's views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..cache.fits import refusal
from ..cache.header import ELSEWHERE
from ..cache.replay import Recorded
from ..cache.shards import CacheError
from ..data.batch import Batch
from ..data.loaders import Loader
from ..data.manifest import Manifest
from ..data.schedule import plan_digest
from ..recipe.load import Recipe


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
                f"teacher.cache: {cache.folder} holds the teacher's answers to "
                f"{loader.quarantine.manifest.name(row)}, which cannot be read now ({why}); "
                "restore the file, or record a cache without it"
            )
        yield replace(batch, answers=cache.at(epoch, step, part))
