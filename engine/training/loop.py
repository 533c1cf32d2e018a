"""Training: the loop, from a recipe to the folder of a run."""

from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch

from ..data.loaders import Loader, make_loader
from ..data.loaders.ondevice import Mixing
from ..data.manifest import Manifest
from ..data.sources import open_source
from ..recipe.load import Recipe
from ..report.page import report
from ..run.chain import trained
from ..run.checkpoint import step_name
from ..run.environment import settings
from ..run.folder import (
    CARRIED_OUT,
    RECIPE,
    changes,
    check_folder,
    create_folder,
    default_folder,
    held,
    plain,
    refuse,
)
from ..run.log import RunLog
from ..run.past import read_run
from ..run.resume import starts_again
from .evaluate import accuracy, evaluate_state
from .meters import Clock
from .optim import lr_at, set_lr
from .ranks import Group, join
from .state import State
from .step import Step


def train(recipe: Recipe, out: str | Path | None = None, resume: bool = False) -> Path:
    """Train what the recipe says and return the run's folder (default: runs/NAME).

    Under torchrun every process calls it. With `resume`, a run that was killed goes on from its
    newest good checkpoint and ends as if it had not been killed. Raises ValueError for a folder
    with something in it and no `resume`; for a recipe, data or teacher other than those that the
    run was started with; for a teacher at chance level; for run.device=cuda without CUDA.
    Raises Diverged, a RuntimeError, when a loss is not finite.

    Networks that have `trained_by` and no checkpoint are trained first, beside the run's folder.
    """
    folder = Path(out) if out is not None else default_folder(recipe)
    recipe = trained(recipe, folder.parent, _train_once)
    run, data = recipe.run, recipe.data
    group = join(run.device)
    with settings(run):
        if group.first:
            check_folder(folder, recipe, resume)
        group.wait()
        train_set, val_set = open_splits(recipe, group)
        batch = group.share(run.batch, "run.batch")
        eval_batch = group.share(run.eval_batch, "run.eval_batch")
        make = partial(
            make_loader, seed=run.seed, rank=group.rank, world=group.world, device=group.device
        )
        with (
            closing(make(train_set, data, batch, train=True)) as loader,
            closing(make(val_set, data, eval_batch, train=False)) as val,
        ):
            sources = {
                "training images": train_set.digest,
                "validation images": val_set.digest,
                "loader": loader.name,  # what "auto" stands for may change
            }
            if group.first:
                print(
                    f"{len(train_set.target)} training and {len(val_set.target)} validation images "
                    f"of {len(train_set.classes)} classes, loader {loader.name}",
                    flush=True,
                )
            labels = torch.from_numpy(train_set.target)
            state = State(recipe, group, len(train_set.classes), sources, labels)
            Training(recipe, folder, group, state, loader, val).run(resume)
        group.wait()
    return folder


def _train_once(recipe: Recipe, folder: Path, resume: bool) -> Path:
    """Train, unless the folder holds the finished run of the same recipe."""
    if resume and read_run(folder).finished:
        was, now = plain(Recipe.load(folder / RECIPE)), plain(recipe)
        drift = changes({k: now.get(k, v) if k in CARRIED_OUT else v for k, v in was.items()}, now)
        refuse(drift, f"cannot use {folder} as it was trained before: its recipe is another")
        return folder
    return train(recipe, folder, resume)


def open_splits(recipe: Recipe, group: Group) -> tuple[Manifest, Manifest]:
    """The training and the validation set; the first process goes first, it may write files."""
    if not group.first:
        group.wait()
    found = open_source(recipe.data, "train"), open_source(recipe.data, "val")
    if group.first:
        group.wait()
    return found


class Training:
    """A run in progress."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        group: Group,
        state: State,
        loader: Loader,
        val: Loader,
    ) -> None:
        self.recipe, self.folder, self.group = recipe, folder, group
        self.state, self.loader, self.val = state, loader, val
        self.checkpoints = folder / "checkpoints"
        self.epoch_steps = loader.steps
        self.epochs = recipe.run.stop_epoch or recipe.run.epochs
        self.step = Step(
            group.wrap(state.distiller),
            state.branches,
            list(state.optimizers.values()),
            [
                partial(average.update, state.branches[name].deployed)
                for name, average in state.averages.items()
            ],
            recipe.optim.clip,
        )
        self.mixing = Mixing(recipe.data, state.classes, recipe.run.seed)

    def run(self, resume: bool) -> None:
        """From wherever the run stands to its end."""
        state, epochs = self.state, self.epochs
        notes = state.restore(self.checkpoints) if resume else []
        if resume and state.done == 0:
            notes += starts_again(self.folder)
        teacher = self.check_teacher() if state.done == 0 else {}
        if self.group.first:
            create_folder(self.folder, self.recipe, self.group.world)
        lock = held(self.folder) if self.group.first else nullcontext()
        with (
            lock,
            RunLog(
                self.folder,
                epochs * self.epoch_steps,
                epochs,
                resume_step=state.done if resume else None,
                rank=self.group.rank,
                facts={"loader": self.loader.name, **teacher},
            ) as log,
        ):
            for note in notes:
                log.note(note)
            for epoch in range(state.done // self.epoch_steps, epochs):
                self.train_epoch(epoch, log)
                self.finish_epoch(epoch + 1, log)
            log.end({f"{k}_{n}": v for k, row in state.results.items() for n, v in row.items()})
        if self.group.first:
            report([self.folder], self.folder / "report.html")

    def check_teacher(self) -> dict[str, float]:
        """Evaluate the frozen teachers and print how good they are; ValueError at chance level."""
        recipe, distiller = self.recipe, self.state.distiller
        specs = {f"assistants.{i}": network for i, network in enumerate(recipe.assistants)}
        if recipe.teacher is not None:
            specs = {"teacher": recipe.teacher, **specs}
        frozen = distiller.frozen()
        measured = accuracy(distiller, frozen, self.val.epoch(0), self.group) if frozen else {}
        for (where, spec), found in zip(specs.items(), measured.values(), strict=True):
            text = f"{where} {spec.name}: top-1 {found['top1']:.2f}, top-5 {found['top5']:.2f}"
            if self.group.first:
                print(text, flush=True)
            chance = 100 / self.state.classes
            at_chance = found["top1"] <= chance + min(chance / 2, 5)
            if at_chance and recipe.run.teacher_at_chance == "refuse":
                raise ValueError(
                    f"{text}; chance is {chance:.2f}, so it has nothing to teach. Check "
                    f"{where}.checkpoint = {spec.checkpoint} and {where}.normalize, or set "
                    "run.teacher_at_chance=allow"
                )
        return {f"teacher_{k}": value for k, value in measured.get("teacher", {}).items()}

    def train_epoch(self, epoch: int, log: RunLog) -> None:
        """The steps of an epoch that are not done yet, with their log records and checkpoints."""
        state, run, optim = self.state, self.recipe.run, self.recipe.optim
        state.distiller.train()
        clock = Clock()
        for batch in clock.count(self.loader.epoch(epoch, state.done % self.epoch_steps)):
            at = state.done / self.epoch_steps  # finished epochs
            for optimizer in state.optimizers.values():
                set_lr(optimizer, lr_at(optim, run.epochs, at))
            images = batch.images.to(self.group.device, non_blocking=True)
            target = batch.target.to(self.group.device, non_blocking=True)
            index = batch.index.to(self.group.device, non_blocking=True)
            images, target = self.mixing(images, target, epoch, state.done % self.epoch_steps)
            terms = self.step(images, target, index, at)
            state.done += 1
            state.meters.add(state.done, terms)
            last = state.done % self.epoch_steps == 0
            if last or state.done % run.log_every == 0:
                values = state.meters.read()
                speed, waiting = clock.read()
                at = state.done / self.epoch_steps
                log.step(state.done, at, values, speed * run.batch, waiting)
            if not last and run.checkpoint_every and state.done % run.checkpoint_every == 0:
                state.save(self.checkpoints, step_name(state.done))

    def finish_epoch(self, epoch: int, log: RunLog) -> None:
        """Evaluate and save after `epoch` finished epochs, where that is due."""
        state, run = self.state, self.recipe.run
        end = epoch == self.epochs
        values = {f"train_{name}": value for name, value in state.meters.read_epoch().items()}
        values["lr"] = lr_at(self.recipe.optim, run.epochs, (state.done - 1) / self.epoch_steps)
        improved = False
        if end or epoch % run.eval_every == 0:
            found = evaluate_state(state, self.val, self.group)
            values = found | values
            result = {"top1": found["top1"], "top5": found["top5"], "epoch": float(epoch)}
            improved = result["top1"] > state.results.get("best", {"top1": -1.0})["top1"]
            state.results["last"] = result
            if improved:
                state.results["best"] = result
        log.epoch(epoch, values)
        if improved:
            state.save(self.checkpoints, "best")
        if end or run.checkpoint_every is None or state.done % run.checkpoint_every == 0:
            state.save(self.checkpoints, step_name(state.done))
