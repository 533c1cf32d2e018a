"""The loop of a run: steps, records, evaluations and checkpoints, whatever is trained."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..recipe.load import AnyRecipe
from ..report.page import report
from ..run.checkpoint import BEST, step_name
from ..run.folder import create_folder, held
from ..run.log import RunLog
from ..run.resume import starts_again
from ..run.writer import Writer
from .compiled import Compilations
from .meters import Clock
from .optim import class_of
from .peers import agree, together
from .ranks import Group
from .rate import lr_at
from .stop import Stop
from .task import Task


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

    def run(self, resume: bool) -> str:
        """From wherever the run stands to its end; why it ended before it was finished, else ""."""
        state, first = self.state, self.group.first
        if not first:
            self.compilations.say = lambda text: None
        notes = state.restore(self.checkpoints) if resume else []
        if self.group.world > 2 and 0 < state.done < self.epochs * self.epoch_steps:
            self.rehearse()
            state.restore(self.checkpoints)
        if resume and state.done == 0:
            notes += together(
                self.group,
                "looking at the run's folder",
                lambda: starts_again(self.folder) if first else [],
            )
        facts = self.task.facts | {"optimizer": class_of(state.optimizers)}
        agree(self.group, "where they begin", lambda: state.identity() | self.task.identity())
        facts |= self.task.check_teachers() if state.done == 0 else {}
        with ExitStack() as opened:
            log = together(
                self.group,
                "opening the run's folder",
                lambda: self.open(opened, state.done if resume else None, facts),
            )
            self.writer = opened.enter_context(Writer(log.note))
            run = self.recipe.run
            self.stop = opened.enter_context(Stop(self.group, run.time_limit, run.timeout))
            for note in notes:
                log.note(note)
            self.compilations.say = log.say
            if state.done % self.epoch_steps == 0 and state.meters.epoch.any():
                self.finish_epoch(state.done // self.epoch_steps, log)  # it stopped before that
            for epoch in range(state.done // self.epoch_steps, self.epochs):
                with self.compilations.phase("training", log.note):
                    self.train_epoch(epoch, log)
                if self.stop.why:
                    held_by = step_name(state.done)
                    log.note(f"stopped by {self.stop.why}, resume=true goes on from {held_by}")
                    break
                self.finish_epoch(epoch + 1, log)
            self.writer.finish()
            if not self.stop.why:
                results = state.results.items()
                log.end({f"{k}_{n}": v for k, row in results for n, v in row.items()})
        if first and not self.stop.why:
            try:
                report([self.folder], self.folder / "report.html")
            except OSError as error:  # a page is no reason for a finished run to fail
                print(f"{error}; kdfuse report {self.folder} writes the page", flush=True)
        return self.stop.why

    def rehearse(self) -> None:
        """Take the coming step of a resumed run, for its state to be restored again.

        DistributedDataParallel moves gradients to other places in its buckets after its second
        step, and with three processes or more the place decides in which order they are summed.
        """
        epoch, number = divmod(self.state.done, self.epoch_steps)
        for batch in self.task.epoch(epoch, number):
            for _ in range(min(self.state.done, 2)):
                self.state.begin(self.lr(self.state.done), self.task.schedule(epoch, number))
                self.task.step(batch)
            break

    def open(self, opened: ExitStack, resume_step: int | None, facts: dict[str, Any]) -> RunLog:
        """The run's log, with the folder held by the first process as long as `opened` is."""
        if self.group.first:
            create_folder(self.folder, self.recipe, self.group.world)
            opened.enter_context(held(self.folder))
        log = RunLog(
            self.folder,
            self.epochs * self.epoch_steps,
            self.epochs,
            resume_step=resume_step,
            rank=self.group.rank,
            facts=facts,
        )
        return opened.enter_context(log)

    def train_epoch(self, epoch: int, log: RunLog) -> None:
        """The steps of an epoch that are not done yet, with their log records and checkpoints.

        Told to stop, it saves and leaves out the rest.
        """
        state, run = self.state, self.recipe.run
        clock = Clock()
        start = state.done % self.epoch_steps
        for batch in clock.count(self.task.epoch(epoch, start)):
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
                log.step(state.done, at, values, speed * run.batch, waiting)
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
        improved = False
        self.doing = f"the end of epoch {epoch}"
        if end or epoch % run.eval_every == 0:
            with self.compilations.phase("evaluation", log.note):
                found = self.task.evaluate()
            values = found | values
            improved = self.keep(found, epoch)
        log.epoch(epoch, values)
        if end or run.checkpoint_every is None or self.checkpoint_is_due():
            self.save(step_name(state.done), best=improved)
        elif improved:
            self.save(BEST)

    def save(self, name: str, best: bool = False) -> None:
        """A checkpoint of the state as it is, written while the loop goes on."""
        self.state.save(self.checkpoints, name, best=best, write=self.writer.save)

    def keep(self, found: dict[str, float], epoch: int) -> bool:
        """Take down the results of an evaluation; whether they are the best so far."""
        if not found:
            return False
        results, score = self.state.results, self.task.results[0]
        last = {name: found[name] for name in self.task.results if name in found}
        results["last"] = {**last, "epoch": float(epoch)}
        improved = found[score] > results.get("best", {score: -1.0})[score]
        if improved:
            results["best"] = results["last"]
        return improved

    def lr(self, step: int) -> float:
        """The learning rate of a step of the run, 0-based."""
        return lr_at(self.recipe.optim, self.recipe.run, step / self.epoch_steps)

    def checkpoint_is_due(self) -> bool:
        every = self.recipe.run.checkpoint_every
        return every is not None and self.state.done % every == 0
