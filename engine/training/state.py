"""All that a run changes while it trains, and the way of that into a checkpoint and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_flatten_with_path

from ..recipe.load import AnyRecipe
from ..run import checkpoint, resume
from . import process
from .ema import AVERAGED, EMA
from .meters import Diverged, Meters
from .optim import class_of, rates, saved, set_lr
from .peers import from_first, together
from .ranks import Group
from .scalars import Scalars

STATISTICS = ("running_mean", "running_var")  # of BatchNorm, by the ends of their names


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
        self.meters = Meters(group)
        self.now = Scalars(group.device)  # of the step at hand
        self.quarantine: Quarantine | None = None  # where the training images have one
        self.done = 0  # finished steps
        self.results: dict[str, dict[str, float]] = {}  # the best and the last evaluation
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
        whenever it is made, the bytes stay the same. Raises Diverged instead when the losses since
        the last log record, or the weights, are not finite.
        """
        whole = name != checkpoint.BEST
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
            }
        facts = {
            "step": self.done,
            "classes": self.classes,
            "results": self.results,
            "sources": self.sources,
            "machine": self.machine,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        if self.group.first:
            write(folder, name, state, facts, keep=self.recipe.run.keep, best=best)
        for value, was in zip(self._statistics(), own, strict=True):
            value.copy_(was)

    def restore(self, folder: Path) -> list[str]:
        """Go on from the newest checkpoint that is good to the first process, if there is one;
        notes for the log.

        Raises ValueError when recipe, data or teacher are not those of the checkpoint.
        """
        group, doing = self.group, "reading a checkpoint"
        own = together(group, doing, lambda: checkpoint.latest(folder) if group.first else None)
        chosen = from_first(group, own and [own.path.name, *own.skipped], doing)
        if chosen is None:
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
        self.done, self.results = facts["step"], facts["results"]
        return resume.notes(found, self.machine)

    def _read(
        self, folder: Path, name: str, *skipped: str, found: checkpoint.Latest | None
    ) -> checkpoint.Latest:
        """The checkpoint that the first process chose; `found` if this is that one."""
        if found is None:
            state, facts = checkpoint.load(folder / name)
            found = checkpoint.Latest(folder / name, state, facts, list(skipped))
        resume.check_same_run(found, self.sources, self.recipe)
        return found

    def identity(self) -> dict[str, Any]:
        """What all processes of a run have alike before they take a step, of JSON's types.

        Running statistics are each process's own.
        """
        weights = digest(self.networks.weights(whole=True), leave_out=STATISTICS)
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


def digest(held: Any, leave_out: tuple[str, ...]) -> str:
    """sha256 of all tensors in nested dicts and lists, with their places, but of those whose
    names end like this."""
    found = hashlib.sha256()
    for where, value in tree_flatten_with_path(held)[0]:
        place = keystr(where)
        if place.rstrip("']").endswith(leave_out):
            continue
        found.update(place.encode())
        if isinstance(value, torch.Tensor):
            value = value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found.update(value if isinstance(value, bytes) else repr(value).encode())
    return found.hexdigest()
