"""Classification as a task of the loop: students under the recipe's method, scored by top-1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.forms import Form
from ..cache.replay import Recorded
from ..data.batch import Batch
from ..data.loaders import make_loader
from ..data.loaders.feed import on_device
from ..data.loaders.ondevice import Mixing
from ..data.manifest import Manifest
from ..data.schedule import plan_digest
from ..methods import Now, Terms
from ..recipe.load import Recipe
from . import process
from .build import build
from .captured import Captured, CudaGraph
from .evaluate import accuracy, measure
from .guard import guard_of
from .inputs import maker, open_splits, part_of, pixels_of
from .networks import Distiller
from .objects import described, origin
from .optim import build_optimizers
from .peers import together
from .ranks import Group
from .recorded import Told, views_of
from .slt_record import slt_record
from .state import State
from .step import Step
from .trajectories import trajectories_of


class Classification:
    """A recipe's images, networks and step; see Task."""

    results: tuple[str, ...] = ("top1", "top5")

    def __init__(self, recipe: Recipe, group: Group) -> None:
        """Raises ValueError and FileNotFoundError for data and networks that do not fit."""
        self.recipe, self.group = recipe, group
        with ExitStack() as held:
            self.told = together(group, "opening what was recorded", lambda: Told(recipe))
            self.cache = self.told.cache
            sets = open_splits(recipe, group)
            doing = "making loaders and networks"
            self.networks, self.state = together(group, doing, lambda: self._make(held, *sets))
            self.state.quarantine = self.loader.quarantine
            self._images = sets[0]
            self._recording: Callable[[int], AbstractContextManager[Any]] = nullcontext
            if recipe.run.record is not None:
                network, to = self.networks, self.loader
                record = slt_record(recipe, group, self.part, self.told, network, to, sets[0])
                self.state.record = held.enter_context(record)
                self._recording = record.step
            self._opened = held.pop_all()
        self.steps = self.loader.steps
        self.facts: dict[str, Any] = {"loader": self.loader.name, "decode": self.loader.decode}
        self.chance = chance_level(self.state.classes)
        self._step = step_of(self.networks, self.state, self.mixing)
        logits = len(sets[1].target) * self.state.classes
        self._trajectories = trajectories_of(self.networks, logits, group)

    def _make(
        self, held: ExitStack, train_set: Manifest, val_set: Manifest
    ) -> tuple[Distiller, State]:
        """What needs no other process: the loaders, the networks and their state."""
        recipe, group, run, data = self.recipe, self.group, self.recipe.run, self.recipe.data
        cache, part = self.cache, part_of(recipe, group)
        self.part, self.seed, told = part, self.told.seed, self.told
        make = partial(make_loader, seed=self.seed, device=group.device)
        loader = make(train_set, data, run.batch, train=True, part=part, views=told.views)
        self.loader = held.enter_context(closing(loader))
        eval_part = group.part(run.eval_batch, "run.eval_batch")
        val = make(val_set, data, run.eval_batch, train=False, part=eval_part)
        self.val = held.enter_context(closing(val))
        if group.first:
            by = f"loader {self.loader.name}: {self.loader.decode}"
            if self.val.name != self.loader.name:
                by += f"; for evaluation {self.val.name}: {self.val.decode}"
            print(
                f"{len(train_set.target)} training and {len(val_set.target)} validation images "
                f"of {len(train_set.classes)} classes, {by}{data.fraction_seen}",
                flush=True,
            )
        sources = {
            "training images": train_set.digest,
            "validation images": val_set.digest,
            "loader": pixels_of(self.loader, self.val),  # what "auto" stands for may change
        }
        if data.mixup or data.cutmix:
            sources["mixed images"] = "pairs"  # as ondevice.partners; it was another way once
        classes = len(train_set.classes)
        self.mixing = Mixing(data, classes, len(part), self.seed)
        told.check(views_of(recipe, train_set, maker(self.loader), self.seed))
        self.loader.quarantine.take(told.unreadable)
        sources |= told.sources()
        labels = torch.from_numpy(train_set.target)
        made = begin(recipe, group, classes, labels, sources, cache, told.fused)
        told.check_teacher(made[0])
        return made

    def close(self) -> None:
        """Ends the loaders."""
        self._opened.close()

    def identity(self) -> dict[str, Any]:
        """What decides the run's batches, of JSON's types; the same in all processes."""
        batch = self.recipe.run.batch
        return {"plan": plan_digest(self._images, self.recipe.data, batch, self.seed)}

    def check_teachers(self) -> dict[str, float]:
        """Evaluate the frozen teachers and print how good they are; ValueError at chance level."""
        if self.told.slts is not None and self.group.first:
            print(self.told.slts.summary(self.told.epochs), flush=True)
        if self.cache is not None:
            if self.group.first:
                print(f"teacher {self.cache.folder}: {self.cache.header.summary()}", flush=True)
            return {f"teacher_{k}": value for k, value in self.cache.header.facts.items()}
        specs = {f"assistants.{i}": network for i, network in enumerate(self.recipe.assistants)}
        if self.recipe.teacher is not None:
            specs = {"teacher": self.recipe.teacher, **specs}
        frozen = self.networks.frozen()
        measured: dict[str, dict[str, float]] = {}
        if frozen:
            keep = None if self._trajectories is None else self._trajectories.keep
            measured = accuracy(self.networks, frozen, self.val.epoch(0), self.group, keep)
        for (where, spec), found in zip(specs.items(), measured.values(), strict=True):
            text = f"{where} {spec.name}: top-1 {found['top1']:.2f}, top-5 {found['top5']:.2f}"
            if self.group.first:
                print(text, flush=True)
            at_chance = found["top1"] <= self.chance
            if at_chance and self.recipe.run.teacher_at_chance == "refuse":
                raise ValueError(
                    f"{text}; chance is {100 / self.state.classes:.2f}, so it has nothing to "
                    f"teach. Check {origin(where, spec)}, or set run.teacher_at_chance=allow"
                )
        return {f"teacher_{k}": value for k, value in measured.get("teacher", {}).items()}

    def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from step `start`; the networks are in training mode."""
        self.networks.train()
        if start == 0:  # all from the same step on, whatever was found ahead of it
            for found in self.group.all(self.loader.quarantine.found()):
                self.loader.quarantine.take(found)
        batches = self.loader.epoch(self._view(epoch), start)
        batches = self.told.answered(batches, self.loader, epoch, start, self.part)
        return on_device(batches, self.group.device)

    def images(self, epoch: int, number: int) -> list[str]:
        """The files of this process's part of step `number` of `epoch`, both 0-based."""
        return self.loader.names(self._view(epoch), number)

    def schedule(self, epoch: int, number: int) -> dict[str, float]:
        """The numbers of step `number` of `epoch`, both 0-based, beside its learning rate."""
        of_methods = self.networks.schedule(epoch + number / self.steps)
        return of_methods | self.mixing.schedule(self._view(epoch), number)

    def _view(self, epoch: int) -> int:
        """The epoch of the plan that an epoch of the run sees."""
        return epoch if self.told.views is None else epoch % self.told.views

    def step(self, batch: Batch) -> Terms:
        """Train on a batch with the numbers in the state: its detached 0-dim terms."""
        now = self.state.now
        with self._recording(self.state.done):
            return self._step(now, batch.images, batch.target, batch.index, *batch.answers)

    def evaluate(self) -> dict[str, float]:
        """Percent: top1 and top5 of the student, slt0_top1 and so on; and trajectories."""
        self.state.average_batchnorm()
        return measure(self.networks, self.val.epoch(0), self.group, self._trajectories)


def chance_level(classes: int) -> float:
    """The highest top-1, in percent, that says nothing of a network."""
    chance = 100 / classes
    return chance + min(chance / 2, 5)


def begin(
    recipe: Recipe,
    group: Group,
    classes: int,
    labels: Tensor,
    sources: dict[str, str],
    cache: Recorded | None = None,
    fused: Form | None = None,
) -> tuple[Distiller, State]:
    """The networks of a recipe as they are before the first step, and the state of their run.

    `labels` are the training set's (images,); `cache` has the teacher's answers where the recipe
    has one in place of the network, `fused` is the form of its SL-Ts' where it has a record.
    """
    if cache is None and recipe.teacher is not None and recipe.teacher.cache is not None:
        raise ValueError(
            "teacher.cache: its answers are to the views of a run, and these batches are not; "
            "leave it out"
        )
    process.seed_weights(recipe.run.seed)
    recorded = None if cache is None else cache.header.form
    networks = build(recipe, classes, group.device, labels, recorded, fused)
    if cache is not None:
        cache.check_weights(networks.teacher_digest)
        networks.teacher_digest = cache.layout.digest
    if recipe.run.sync_batchnorm:
        if group.device.type == "cpu":
            raise ValueError(
                "run.sync_batchnorm=true: PyTorch's SyncBatchNorm works on GPUs alone; set "
                "run.sync_batchnorm=false"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(networks)
    networks.prepare(recipe.run.compiled)
    students = [learner.student for learner in networks.learners.values()]
    optimizers = build_optimizers(recipe.optim, networks.trained(), students)
    sources |= described(recipe, networks)
    state = State(recipe, group, networks, optimizers, classes, sources)
    process.seed_training(recipe.run.seed, group.rank)
    return networks, state


def step_of(networks: Distiller, state: State, mixing: Mixing) -> Callable[..., Terms]:
    """The step that trains a state's networks, with those of all processes.

    Takes the step's numbers, and images, labels and row numbers as a loader gives them. Raises
    ValueError where run.accumulate or run.capture cannot be done.
    """
    recipe, group, optimizers = state.recipe, state.group, list(state.optimizers.values())
    assert isinstance(recipe, Recipe)
    run, part = recipe.run, part_of(recipe, group)
    step = Step(
        group.wrap(networks, run),
        optimizers,
        state.meters,
        networks.update_averages,
        recipe.optim.clip,
        run.accumulate,
        len(part) * group.world / run.batch,
        guard_of(recipe.optim, optimizers, networks),
    )

    def mixed(now: Now, images: Tensor, target: Tensor, index: Tensor, *answers: Tensor) -> Terms:
        return step(now, *mixing(now, images, target), index, *answers)

    if not run.capture:
        return mixed
    if group.device.type != "cuda" or group.world > 1:
        where = "on the CPU" if group.device.type != "cuda" else f"of {group.world} processes"
        raise ValueError(
            "run.capture=true records the step of one process on a CUDA device, and this run is "
            f"{where}; set run.capture=false"
        )
    return Captured(mixed, optimizers, CudaGraph())
