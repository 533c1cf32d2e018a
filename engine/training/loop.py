"""The loop of a run: steps, records, evaluations and checkpoints, whatever is trained."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..recipe.load import AnyRecipe
from ..run.checkpoint import BEST, step_name
from ..run.folder import create_folder
from ..run.lease import Lease, held
from ..run.log import RunLog
from ..run.writer import Writer
from .alarms import of_evaluation, of_record
from .compiled import Compilations
from .meters import Clock, NotFinite
from .optim import class_of
from .peers import agree, together
from .ranks import Group
from .rate import lr_at
from .resumption import again, resumed
from .rollback import go_back
from .stop import Stop
from .task import Task

OPENING = "opening the run's folder"


class Loop:
    """A run in progress."""

    def __init__(
        self,
        recipe: AnyRecipe,
        folder: Path,
        group: Group,
        task: Task,
        compilations: Compilations,
    ) -> None:
        self.recipe, self.folder, self.group, self.task = recipe, folder, group, task
        self.compilations = compilations
        self.state, self.epoch_steps = task.state, task.steps
        self.checkpoints = folder / "checkpoints"
        self.epochs = recipe.run.stop_epoch or recipe.run.epochs
        self.doing = "making ready"  # for what is said where a process fails
        self.lease: Lease | None = None  # of the process that writes

    def run(self, resume: bool) -> str:
        """From wherever the run stands to its end; why it ended before it was finished, else ""."""
        state = self.state
        if not self.group.first:
            self.compilations.say = lambda text: None
        steps = self.epochs * self.epoch_steps
        notes = resumed(self.task, self.group, self.folder, steps, self.lr) if resume else []
        facts = self.task.facts | {"optimizer": class_of(state.optimizers)}
        agree(self.group, "where they begin", lambda: state.identity() | self.task.identity())
        facts |= self.task.check_teachers() if state.done == 0 else {}
        with ExitStack() as opened:
            together(self.group, OPENING, lambda: self.hold(opened))
            run = self.recipe.run
            self.stop = opened.enter_context(Stop(self.group, run.time_limit, run.timeout))
            notes = [*(self.lease.notes if self.lease else []), *notes]
            back = self.train(state.done if resume else None, notes, facts)
            if back:
                self.train(state.done, back, facts, save=True)
        return self.stop.why

    def hold(self, opened: ExitStack) -> None:
        """Let the first process make the run's folder, and hold it as long as `opened` is."""
        if self.group.first:
            self.lease = opened.enter_context(held(self.folder, self.group.world))
            create_folder(self.folder, self.recipe, self.group.world)

    def train(
        self, resume_step: int | None, notes: list[str], facts: dict[str, Any], save: bool = False
    ) -> list[str]:
        """From where the state stands to where the run is finished or told to stop.

        The log keeps what it has up to `resume_step`, None for a new one. With `save` a checkpoint
        comes first. What is returned are the notes of a state that went back to a checkpoint, to be
        trained from there; [] else. Raises Diverged.
        """
        try:
            with ExitStack() as opened:
                log = together(
                    self.group, OPENING, lambda: opened.enter_context(self.open(resume_step, facts))
                )
                self.writer = opened.enter_context(Writer(log.note))
                for note in notes:
                    log.note(note)
                if save:
                    self.save(step_name(self.state.done))
                self.train_epochs(log)
        except NotFinite as fault:  # behind the writer's end: all checkpoints are on the disk
            self.doing = "going back to a checkpoint"
            return go_back(fault, self.task, self.group, self.checkpoints)
        return []

    def open(self, resume_step: int | None, facts: dict[str, Any]) -> RunLog:
        """The run's log."""
        return RunLog(
            self.folder,
            self.epochs * self.epoch_steps,
            self.epochs,
            resume_step=resume_step,
            rank=self.group.rank,
            facts=facts,
            recipe=self.recipe,
        )

    def train_epochs(self, log: RunLog) -> None:
        """The epochs that are not done yet, each with what follows it, until told to stop."""
        state = self.state
        self.compilations.say = log.say
        if state.done % self.epoch_steps == 0 and state.meters.epoch.any():
            self.finish_epoch(state.done // self.epoch_steps, log)  # it stopped before that
        for epoch in range(state.done // self.epoch_steps, self.epochs):
            with self.compilations.phase("training", log.note):
                self.train_epoch(epoch, log)
            if self.stop.why:
                told = f"stopped by {self.stop.why}, {again(self.recipe)} goes on from "
                log.note(told + step_name(state.done), state.done)
                break
            self.finish_epoch(epoch + 1, log)
        self.writer.finish()
        if not self.stop.why:
            results = state.results.items()
            log.end({f"{k}_{n}": v for k, row in results for n, v in row.items()})

    def train_epoch(self, epoch: int, log: RunLog) -> None:
        """The steps of an epoch that are not done yet, with their log records and checkpoints.

        Told to stop, it saves and leaves out the rest.
        """
        state, run = self.state, self.recipe.run
        clock = Clock()
        for batch in clock.count(self.task.epoch(epoch, state.done % self.epoch_steps)):
            number = state.done % self.epoch_steps
            self.doing = f"step {state.done + 1}"
            state.begin(self.lr(state.done), self.task.schedule(epoch, number))
            self.task.step(batch)
            state.done += 1
            last = state.done % self.epoch_steps == 0
            if last or state.done % run.log_every == 0:
                values = state.meters.read()
                speed, waiting = clock.read()
                at = state.done / self.epoch_steps
                self.check_lease()
                log.step(state.done, at, values, speed * run.batch, waiting)
                for text in of_record(state, values):
                    log.note(text)
            self.writer.check()
            if self.stop.asked() or (not last and self.checkpoint_is_due()):
                self.save(step_name(state.done))
            if self.stop.why:
                return

    def finish_epoch(self, epoch: int, log: RunLog) -> None:
        """Evaluate and save after `epoch` finished epochs, where that is due."""
        state, run = self.state, self.recipe.run
        end = epoch == self.epochs
        values = {f"train_{name}": value for name, value in state.meters.read_epoch().items()}
        values["lr"] = self.lr(state.done - 1)
        found: dict[str, float] = {}
        improved = False
        self.doing = f"the end of epoch {epoch}"
        if end or epoch % run.eval_every == 0:
            with self.compilations.phase("evaluation", log.note):
                found = self.task.evaluate()
            values = found | values
            improved = state.keep(found, self.task.results, epoch)
        self.check_lease()
        log.epoch(epoch, values)
        if found and (text := of_evaluation(state, self.task.results[0], self.task.chance)):
            log.note(text)
        if end or run.checkpoint_every is None or self.checkpoint_is_due():
            self.save(step_name(state.done), best=improved)
        elif improved:
            self.save(BEST)

    def save(self, name: str, best: bool = False) -> None:
        """A checkpoint of the state as it is, written while the loop goes on."""
        self.check_lease()
        self.state.save(self.checkpoints, name, best=best, write=self.writer.save)

    def check_lease(self) -> None:
        """Raise LeaseLost before anything is written into a folder that is another's by now."""
        if self.lease is not None:
            self.lease.check()

    def lr(self, step: int) -> float:
        """The learning rate of a step of the run, 0-based."""
        optim = self.recipe.optim
        rate = lr_at(optim, self.recipe.run, step / self.epoch_steps)
        return rate if self.state.went_back is None else optim.rollback_lr * rate

    def checkpoint_is_due(self) -> bool:
        every = self.recipe.run.checkpoint_every
        return every is not None and self.state.done % every == 0
