"""Training from a teacher's recorded answers: whether they are those to a run's views."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import header as headers
from ..cache.fits import refusal
from ..cache.forms import Form
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
from .networks import Distiller


class Told:
    """What a run has recorded answers of, in place of networks that run: its teacher, its SL-Ts."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises CacheError for what is not whole, of another teacher or method, in a form that one
        of the methods cannot learn from, or of other views than the rest."""
        run = recipe.run
        self.epochs = run.stop_epoch or run.epochs
        self.cache, self.slts = _cache(recipe), _slts(recipe, self.epochs)
        self.recording = run.record is not None
        # Of the plan: its seed, and the epochs after which its views come again; None: never.
        self.seed: int = run.seed
        self.views: int | None = None
        if self.cache is not None:
            self.seed, self.views = self.cache.header.seed, self.cache.header.views
        if self.slts is not None:
            if self.cache is not None:
                self.slts.check_cache(self.cache, self.epochs)
            self.seed, self.views = self.slts.header.seed, self.slts.again

    def each(self) -> Iterator[Recorded]:
        """In the order in which their answers come with the images."""
        yield from (found for found in (self.cache, self.slts) if found is not None)

    @property
    def fused(self) -> Form | None:
        """The form of the SL-Ts' answers."""
        return None if self.slts is None else self.slts.header.form

    @property
    def unreadable(self) -> dict[int, str]:
        """Rows of the training set that were unreadable when anything was recorded."""
        return {row: why for found in self.each() for row, why in found.unreadable.items()}

    def sources(self) -> dict[str, str]:
        """What a resumed run must have again, by name."""
        if self.slts is not None:
            return {"SL-Ts": self.slts.layout.digest}
        return {"SL-Ts": "recorded"} if self.recording else {}  # by another way to the loss

    def weights(self, networks: Distiller) -> str:
        """The digest of the teacher's weights, wherever its answers come from."""
        cache = self.cache
        return (networks.teacher_digest if cache is None else cache.header.digest) or ""

    def check(self, views: Mapping[str, Any]) -> None:
        """Raise CacheError unless everything is of these views (see `views_of`)."""
        for found in self.each():
            found.check(views)

    def check_teacher(self, networks: Distiller) -> None:
        """Raise CacheError where the SL-Ts learned from another teacher."""
        if self.slts is not None:
            self.slts.check_teacher(self.weights(networks))

    def answered(
        self, batches: Iterator[Batch], loader: Loader, epoch: int, start: int, part: range
    ) -> Iterator[Batch]:
        """The batches of an epoch from step `start`, each with the answers to its images.

        Raises CacheError for an image that can no longer be read: the answer in its place is to it.
        """
        for found in self.each():
            batches = answered(batches, loader, found, epoch, start, part)
        return batches


def _cache(recipe: Recipe) -> Recorded | None:
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


def _slts(recipe: Recipe, epochs: int) -> RecordedSlts | None:
    if recipe.slt is None or recipe.slt.record is None:
        return None
    found = RecordedSlts(recipe.slt.record)
    found.check_run(recipe.method, recipe.slt.name, epochs)
    return found


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
