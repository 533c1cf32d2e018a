"""All that a run changes while it trains, and the way of that into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..recipe.load import AnyRecipe
from ..run import checkpoint, resume
from . import process
from .beside import Record
from .ema import AVERAGED, EMA
from .faults import Faults
from .identity import digest
from .meters import Diverged, Meters
from .optim import class_of, rates, saved, set_lr
from .peers import from_first, together
from .ranks import Group
from .scalars import Scalars


class Networks(Protocol):
    """What a run's networks answer, whatever they are of: a module whose parameters are trained."""

    teacher_digest: str | None

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of every module."""

    def modules(self) -> Iterator[nn.Module]:
        """As of every module."""

    def averages(self) -> list[EMA]:
        """The averages of students, which are not in the module tree."""

    def weights(self, whole: bool) -> dict[str, Any]:
        """What a checkpoint holds; `whole`: all that a resumed run needs, else what is kept."""

    def load(self, held: Mapping[str, Any]) -> None:
        """Take the weights of everything that is trained from what a checkpoint holds."""


class Quarantine(Protocol):
    """What training images answer that may turn out unreadable: rows, each with the reason."""

    def found(self) -> dict[int, str]:
        """Those that this process found."""

    def take(self, found: Mapping[int, str]) -> None:
        """Take out of use what was found elsewhere."""


class State:
    """Networks, optimisers, meters, and how far the run is."""

    def __init__(
        self,
        recipe: AnyRecipe,
        group: Group,
        networks: Networks,
        optimizers: dict[str, Optimizer],
        classes: int,
        sources: Mapping[str, str],
    ) -> None:
        """`sources` name the data; a checkpoint made from other data, or by an optimiser of
        another package, will not be resumed."""
        self.recipe, self.group, self.classes = recipe, group, classes
        self.networks, self.optimizers = networks, optimizers
        self.meters = Meters(group, recipe.optim.skips)
        self.now = Scalars(group.device)  # of the step at hand
        self.quarantine: Quarantine | None = None  # where the training images have one
        self.record: Record | None = None  # of a run that has one
        self.done = 0  # finished steps
        self.results: dict[str, dict[str, float]] = {}  # the best and the last evaluation
        self.losses: list[float] = []  # of the last log records
        self.went_back: int | None = None  # to a checkpoint, from the steps that began here
        self.sources = {**sources, "teacher's weights": networks.teacher_digest}
        made = class_of(optimizers)
        if not made.startswith("torch."):  # of LAMB there are two, which keep other states
            self.sources["optimizer"] = made
        self.machine = resume.machine(group.world, group.device.type)

    def begin(self, lr: float, others: Mapping[str, float]) -> None:
        """Give the coming step its numbers."""
        numbers = {"step": self.done + 1, **rates(self.optimizers.values(), lr), **others}
        for average in self.networks.averages():
            numbers[AVERAGED] = average.share()
        self.now.write(numbers)
        for optimizer in self.optimizers.values():
            set_lr(optimizer, lr, self.now)

    def average_batchnorm(self) -> None:
        """Give all processes the same running statistics, before anything reads them."""
        self.group.average_batchnorm(self._modules())

    def _statistics(self) -> list[Tensor]:
        """What average_batchnorm changes."""
        return self.group.statistics(self._modules())

    def _modules(self) -> Iterator[nn.Module]:
        averages = [average.module.modules() for average in self.networks.averages()]
        return chain(self.networks.modules(), *averages)

    def save(
        self,
        folder: Path,
        name: str,
        *,
        best: bool = False,
        write: Callable[..., object] = checkpoint.save,
    ) -> None:
        """Let `write` write a checkpoint: what a resumed run needs, for "best" the networks alone.

        With `best` that of a step is also the best one. The run goes on as if there had been none:
        whenever it is made, the bytes stay the same. Raises Diverged instead when too many
        steps before it, or the weights, are not finite.
        """
        whole = name != checkpoint.BEST
        if whole and self.record is not None:
            self.record.flush()
        own = [value.clone() for value in self._statistics()]
        self.average_batchnorm()
        self.meters.check()
        self._check_finite()
        state = self.networks.weights(whole)
        if whole:
            state |= {
                "optimizers": {k: saved(o) for k, o in self.optimizers.items()},
                "meters": self.meters.state_dict(),
                "statistics": self.group.all([value.cpu() for value in own]),
                "rng": self.group.all(process.capture()),
                "unreadable": self.group.all(self.quarantine.found() if self.quarantine else {}),
                "faults": self.group.all(self.meters.faults.state_dict()),
            }
        facts = {
            "step": self.done,
            "classes": self.classes,
            "results": self.results,
            "losses": self.losses,
            "went_back": self.went_back,
            "sources": self.sources,
            "machine": self.machine,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        if self.group.first:
            write(folder, name, state, facts, keep=self.recipe.run.keep, best=best)
        for value, was in zip(self._statistics(), own, strict=True):
            value.copy_(was)
        if whole and self.record is not None:  # all have met since they flushed
            self.record.finish(self.done, state["unreadable"])

    def restore(self, folder: Path, before: int | None = None) -> list[str]:
        """Go on from the newest checkpoint that is good to the first process, if there is one;
        notes for the log.

        With `before` from one of fewer steps than that. Raises ValueError when recipe, data or
        teacher are not those of the checkpoint.
        """
        group, doing = self.group, "reading a checkpoint"

        def find() -> checkpoint.Latest | None:
            return checkpoint.latest(folder, before) if group.first else None

        own = together(group, doing, find)
        chosen = from_first(group, own and [own.path.name, *own.skipped], doing)
        if chosen is None:
            if self.record is not None and before is None:
                self.record.rewind(self.done)
            return []
        found = together(group, doing, lambda: self._read(folder, *chosen, found=own))
        state, facts = found.state, found.facts
        self.networks.load(state)
        # Detectors' runs had the one of their student alone.
        optimizers = state.get("optimizers") or {"student": state["optimizer"]}
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizers[name])
        self.meters.load_state_dict(state["meters"])
        own = state.get("statistics", [])
        if len(own) == self.group.world:
            for value, was in zip(self._statistics(), own[self.group.rank], strict=True):
                value.copy_(was)
        if self.quarantine is not None:
            self.quarantine.take(found_by(self.group, state.get("unreadable", [])))
        if self.group.rank < len(state["rng"]):
            process.restore(state["rng"][self.group.rank])
        faults = state.get("faults") or [Faults(group, 0).state_dict()]  # not counted once
        self.meters.faults.load_state_dict(faults[min(group.rank, len(faults) - 1)])
        self.done, self.results = facts["step"], facts["results"]
        self.losses, self.went_back = facts.get("losses", []), facts.get("went_back")
        if self.record is not None:
            self.record.rewind(self.done)
        notes = resume.notes(found, self.machine, self.sources)
        self.sources |= resume.first_weights(facts["sources"])
        return notes

    def go_back(self, folder: Path, step: int) -> list[str]:
        """Go on from the newest good checkpoint of before `step`: once in a run, as its checkpoints
        then say. Notes for the log; [] where there is none, or it was done before.
        """
        if self.went_back is not None:
            return []
        best = self.results.get("best")
        notes = self.restore(folder, before=step)
        if notes:
            self.went_back = step
            if best is not None:  # its checkpoint is still there
                self.results["best"] = best
        return notes

    def _read(
        self, folder: Path, name: str, *skipped: str, found: checkpoint.Latest | None
    ) -> checkpoint.Latest:
        """The checkpoint that the first process chose; `found` if this is that one."""
        if found is None:
            state, facts = checkpoint.load(folder / name)
            found = checkpoint.Latest(folder / name, state, facts, list(skipped))
        resume.check_same_run(found, self.sources, self.recipe)
        return found

    def keep(self, found: dict[str, float], names: Sequence[str], epoch: int) -> bool:
        """Take down an evaluation's results of these names; whether they are the best so far.

        The first name decides. Without results nothing changes.
        """
        if not found:
            return False
        score = names[0]
        last = {name: found[name] for name in names if name in found}
        self.results["last"] = {**last, "epoch": float(epoch)}
        improved = found[score] > self.results.get("best", {score: -1.0})[score]
        if improved:
            self.results["best"] = self.results["last"]
        return improved

    def identity(self) -> dict[str, Any]:
        """What all processes of a run have alike before they take a step, of JSON's types."""
        weights = digest(self.networks.weights(whole=True))
        return {"step": self.done, "weights": weights, **self.sources}

    def _check_finite(self) -> None:
        weights = [parameter.isfinite().all() for parameter in self.networks.parameters()]
        if not torch.stack(weights).all():
            raise Diverged(
                f"the weights after step {self.done} are not finite: stopped, checkpoints before "
                "it are kept; lower optim.lr, add optim.warmup_epochs or look at the data"
            )


def found_by(group: Group, unreadable: list[dict[int, str]]) -> dict[int, str]:
    """What this process had found, or all together where they were not as many."""
    if len(unreadable) == group.world:
        return unreadable[group.rank]
    return {row: why for found in unreadable for row, why in found.items()}
