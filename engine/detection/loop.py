"""Training of detectors: the loop, from a recipe to the folder of a run."""

from __future__ import annotations

from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

from torch import nn

from ..run.checkpoint import step_name
from ..run.environment import settings
from ..run.folder import check_folder, create_folder, default_folder, held
from ..run.log import RunLog
from ..run.resume import starts_again
from ..training.meters import Clock
from ..training.optim import lr_at, set_lr
from ..training.ranks import Group, join
from .coco import Coco, check_same_categories, read_coco
from .evaluate import box_ap, check_pycocotools
from .loader import Loader
from .method import Terms
from .networks import check_frozen
from .recipe import DetectionRecipe
from .state import State


def train(recipe: DetectionRecipe, out: str | Path | None = None, resume: bool = False) -> Path:
    """Train what the recipe says and return the run's folder (default: runs/NAME).

    Under torchrun every process calls it. With `resume`, a run that was killed goes on from its
    newest good checkpoint and ends as if it had not been killed. Raises ValueError for a folder
    with something in it and no `resume`; for a recipe, data or teacher other than those that the
    run was started with; for random weights that would stay so, in a teacher or in a frozen
    part of the student. Raises Diverged, a RuntimeError, when a loss is not finite.
    """
    folder = Path(out) if out is not None else default_folder(recipe)
    run, data = recipe.run, recipe.data
    check_weights(recipe)
    if data.val:
        check_pycocotools()
    group = join(run.device)
    with settings(run), ExitStack() as stack:
        if group.first:
            check_folder(folder, recipe, resume)
        group.wait()
        train_set = read_coco(data.root, "train")
        loader = stack.enter_context(
            closing(loader_of(recipe, train_set, group.share(run.batch, "run.batch"), group))
        )
        if loader.steps == 0:
            raise ValueError(
                f"run.batch={run.batch} is larger than the training set of {len(train_set)} "
                "images with boxes; lower run.batch"
            )
        sources = {"training images": train_set.digest}
        val = None
        if data.val:
            val = stack.enter_context(closing(val_loader(recipe, train_set, group)))
            sources["validation images"] = val.coco.digest
        if group.first:
            count = len(val.coco) if val else 0
            print(
                f"{len(train_set)} training and {count} validation images of "
                f"{len(train_set.categories)} categories",
                flush=True,
            )
        state = State(recipe, group, len(train_set.categories), sources)
        Training(recipe, folder, group, state, loader, val).run(resume)
        group.wait()
    return folder


def check_weights(recipe: DetectionRecipe) -> None:
    """ValueError for random weights that training would leave as they are."""
    check_frozen(recipe.student)
    teacher, allowed = recipe.teacher, recipe.run.teacher_at_chance == "allow"
    if teacher is not None and teacher.checkpoint is None and not allowed:
        raise ValueError(
            "teacher.checkpoint: null leaves the teacher's weights random, it has nothing to "
            "teach; give teacher.checkpoint=FILE, a run of coco/baseline, or set "
            "run.teacher_at_chance=allow"
        )


def loader_of(recipe: DetectionRecipe, coco: Coco, batch: int, group: Group) -> Loader:
    """This process's loader of a set."""
    seed, rank, world = recipe.run.seed, group.rank, group.world
    return Loader(coco, recipe.data, batch, seed=seed, rank=rank, world=world)


def val_loader(recipe: DetectionRecipe, train_set: Coco, group: Group) -> Loader:
    """This process's loader of the validation set, whose categories are the training set's."""
    coco = read_coco(recipe.data.root, "val")
    check_same_categories(train_set, coco)
    return loader_of(recipe, coco, group.share(recipe.run.eval_batch, "run.eval_batch"), group)


class Training:
    """A run in progress."""

    def __init__(
        self,
        recipe: DetectionRecipe,
        folder: Path,
        group: Group,
        state: State,
        loader: Loader,
        val: Loader | None,
    ) -> None:
        self.recipe, self.folder, self.group = recipe, folder, group
        self.state, self.loader, self.val = state, loader, val
        self.checkpoints = folder / "checkpoints"
        self.epoch_steps = loader.steps
        self.epochs = recipe.run.stop_epoch or recipe.run.epochs
        self.model: nn.Module = group.wrap(state.distiller)

    def run(self, resume: bool) -> None:
        """From wherever the run stands to its end."""
        state, epochs = self.state, self.epochs
        notes = state.restore(self.checkpoints) if resume else []
        if resume and state.done == 0:
            notes += starts_again(self.folder)
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
            ) as log,
        ):
            for note in notes:
                log.note(note)
            for epoch in range(state.done // self.epoch_steps, epochs):
                self.train_epoch(epoch, log)
                self.finish_epoch(epoch + 1, log)
            log.end({f"{k}_{n}": v for k, row in state.results.items() for n, v in row.items()})

    def train_epoch(self, epoch: int, log: RunLog) -> None:
        """The steps of an epoch that are not done yet, with their log records and checkpoints."""
        state, run, optim = self.state, self.recipe.run, self.recipe.optim
        state.distiller.train()
        clock = Clock()
        for batch in clock.count(self.loader.epoch(epoch, state.done % self.epoch_steps)):
            set_lr(state.optimizer, lr_at(optim, run.epochs, state.done / self.epoch_steps))
            pairs = [sample.on(self.group.device) for sample in batch]
            terms = self.step([image for image, _ in pairs], [target for _, target in pairs])
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

    def step(self, images: list, targets: list) -> Terms:
        """One step of the optimiser; the losses, detached."""
        terms: Terms = self.model(images, targets)
        self.state.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        self.state.optimizer.step()
        return {name: value.detach() for name, value in terms.items()}

    def finish_epoch(self, epoch: int, log: RunLog) -> None:
        """Evaluate and save after `epoch` finished epochs, where that is due."""
        state, run = self.state, self.recipe.run
        end = epoch == self.epochs
        values = {f"train_{name}": value for name, value in state.meters.read_epoch().items()}
        values["lr"] = lr_at(self.recipe.optim, run.epochs, (state.done - 1) / self.epoch_steps)
        improved = False
        if self.val is not None and (end or epoch % run.eval_every == 0):
            student = state.distiller.student
            found = box_ap(student, self.val.coco, self.val.every(), self.group)
            values = found | values
            result = {**found, "epoch": float(epoch)}
            improved = result["ap"] > state.results.get("best", {"ap": -1.0})["ap"]
            state.results["last"] = result
            if improved:
                state.results["best"] = result
        log.epoch(epoch, values)
        if improved:
            state.save(self.checkpoints, "best")
        if end or run.checkpoint_every is None or state.done % run.checkpoint_every == 0:
            state.save(self.checkpoints, step_name(state.done))
