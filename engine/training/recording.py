"""Recording a teacher: its answers to every view of some epochs of the plan, into a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache import header as headers
from ..cache.forms import form_of
from ..cache.header import Header
from ..cache.shards import look, write
from ..data.loaders import Loader, make_loader
from ..data.loaders.feed import on_device
from ..data.loaders.ondevice import Mixing
from ..data.plan import RECORD, key, keys
from ..methods.parts.labels import hard
from ..recipe.load import Recipe
from ..run.chain import trained
from ..run.lease import held
from . import process
from .build import frozen
from .classification import chance_level
from .evaluate import accuracy
from .inputs import maker, open_splits
from .networks import Distiller
from .peers import from_first, together
from .process import settings
from .ranks import Group, join
from .recorded import begun, out_of_use, views_of
from .scalars import Scalars
from .speed import settled
from .start import train_once

Told = Callable[[int, int], None]  # files done, of how many
OPENING = "opening the cache"


def record(recipe: Recipe, folder: Path, told: Told = lambda done, all: None) -> Header:
    """Write the answers of a recipe's teacher into a folder, or go on with one that is begun.

    Under torchrun every process calls it; each writes files of its own, the same as one alone
    would. Raises CacheError where the folder holds another cache, ValueError for a recipe without
    a teacher, or one whose settings do not fit the data.
    """
    if recipe.teacher is None:
        raise ValueError(f"{recipe.name} has no teacher to record; take a recipe that has one")
    if recipe.teacher.cache is not None:
        raise ValueError("teacher.cache: to be recorded the teacher has to run; leave it out")
    for i, network in enumerate(recipe.cache.teachers):
        if network.trained_by is not None and not (network.checkpoint or network.kept):
            raise ValueError(
                f"cache.teachers.{i}.trained_by: only the recipe's own teacher is trained first; "
                "train this one and give its checkpoint"
            )
    group = join(recipe.run.device, recipe.run.timeout)
    recipe = trained(recipe, folder.parent, train_once)
    recipe = settled(recipe, group.device)
    with settings(recipe.run):
        return _record(recipe, group, folder, told)


def _record(recipe: Recipe, group: Group, folder: Path, told: Told) -> Header:
    run, data, first = recipe.run, recipe.data, group.first
    images, val_images = open_splits(recipe, group)
    process.seed_weights(run.seed)
    classes = len(images.classes)
    temperature = getattr(recipe.method, "temperature", None)
    form_of(recipe.cache, classes, temperature)  # what it refuses, before anything is made
    doing = "making the teacher"
    made = together(group, doing, lambda: frozen(recipe, classes, group.device))
    networks, shapes = made
    form = form_of(recipe.cache, classes, temperature, shapes)
    networks.prepare(run.compiled)
    networks.eval()
    make = partial(make_loader, seed=run.seed, device=group.device)
    with ExitStack() as opened:
        loader = opened.enter_context(closing(make(images, data, run.batch, train=True)))

        def open_folder() -> bool:
            if not first:
                return False
            opened.enter_context(held(folder, group.world))
            return begun(folder, own, "out")

        own = Header(
            form=form,
            views=recipe.cache.views or run.epochs,
            steps=loader.steps,
            seed=run.seed,
            teachers=tuple(n.name for n in (recipe.teacher, *recipe.cache.teachers) if n),
            digest=networks.teacher_digest or "",
            numerics=_numerics(recipe),
            facts={},
            **views_of(recipe, images, maker(loader), run.seed),
        )
        if not from_first(group, together(group, OPENING, open_folder), OPENING):
            part = group.part(run.eval_batch, "run.eval_batch")
            with closing(make(val_images, data, run.eval_batch, train=False, part=part)) as val:
                measured = accuracy(networks, networks.frozen(), val.epoch(0), group)
            own = replace(own, facts=measured["teacher"])
            if own.facts["top1"] <= chance_level(classes) and run.teacher_at_chance == "refuse":
                raise ValueError(
                    f"teacher {own.teachers[0]}: top-1 {own.facts['top1']:.2f} is chance, so "
                    "it has nothing to teach; check teacher.checkpoint and teacher.normalize, or "
                    "set run.teacher_at_chance=allow"
                )
            together(group, OPENING, lambda: headers.write(folder, own) if first else None)
        shards = _Shards(recipe, networks, loader, own, folder, group.device)
        mine = list(own.layout().shards())[group.rank :: group.world]

        def work() -> None:
            for view, steps in mine:
                shards.make(view, steps)
                told(1, len(mine))

        together(group, "recording", work)
    group.wait()  # the first process keeps what the others have just read
    return headers.read(folder)


def _numerics(recipe: Recipe) -> dict[str, Any]:
    """What the answers depend on beside the teachers' weights and their images."""
    run, teachers = recipe.run, (recipe.teacher, *recipe.cache.teachers)
    own = [t and t.normalize and t.normalize.model_dump(mode="json") for t in teachers]
    return {
        "amp": run.amp,
        "tf32": run.tf32,
        "channels_last": run.channels_last,
        "compile": run.compiled,
        "normalize": own,
    }


class _Shards:
    """Makes the files of a cache, each alone: what is in one hangs on nothing before it."""

    def __init__(
        self,
        recipe: Recipe,
        networks: Distiller,
        loader: Loader,
        header: Header,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.networks, self.loader, self.header, self.folder = networks, loader, header, folder
        self.device, self.data = device, recipe.data
        self.layout = header.layout()
        self.mixing = Mixing(recipe.data, header.form.classes, header.batch, header.seed)
        self.now = Scalars(device)

    def make(self, view: int, steps: range) -> None:
        """The file of these steps of a view, unless it is there."""
        path = self.layout.path(self.folder, view, steps.start)
        try:
            look(path, self.layout, view, steps)
            return
        except FileNotFoundError:
            pass
        made, right, entropy = [], 0, 0.0
        batches = on_device(self.loader.epoch(view, steps.start), self.device)
        for step, batch in zip(steps, batches, strict=False):  # they end with the view
            self.now.write({"step": 1, **self.mixing.schedule(view, step)})
            images, target = self.mixing(self.now, batch.images, batch.target)
            several, taps = self.networks.teach(images)
            logits = averaged(several, self.header.form.temperature)
            label = hard(target)
            right += int((logits.argmax(1) == label).sum())
            log_p = (logits.double() / (self.header.form.temperature or 1.0)).log_softmax(1)
            entropy -= float((log_p.exp() * log_p).nan_to_num(0.0).sum())
            made.append(self._rows(view, step, logits.cpu(), label.cpu(), taps))
        quarantine = self.loader.quarantine
        found = quarantine.found()
        bad = out_of_use(quarantine.manifest, found, self.header, self.data, view, steps)
        sums = {"right": float(right), "entropy": round(entropy, 3)}
        write(path, self.layout, view, np.concatenate(made), bad, sums)

    def _rows(
        self, view: int, step: int, logits: Tensor, label: Tensor, taps: Mapping[str, Tensor]
    ) -> NDArray[Any]:
        first = step * self.header.batch
        places = np.arange(first, first + len(logits))
        of_rows = torch.from_numpy(keys(key(self.header.seed, view, RECORD), places))
        features = [taps[name].cpu() for name, _ in self.header.form.taps]
        return self.header.form.encode(logits, label, of_rows, features)


def averaged(logits: list[Tensor], temperature: float | None) -> Tensor:
    """(N, C): one teacher's logits, or such that their softmax at T is the mean of several."""
    if len(logits) == 1:
        return logits[0].float()
    assert temperature is not None
    each = torch.stack([(x.float() / temperature).log_softmax(1) for x in logits])
    return temperature * (each.logsumexp(0) - math.log(len(logits)))
