"""All that a run changes while it trains, and the way of that into a checkpoint and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..recipe.load import Recipe
from ..run import checkpoint, resume, rng
from ..run.environment import seed
from .learner import Branch
from .meters import Meters
from .networks import MAIN, build, prefix, role
from .optim import EMA, build_optimizer, decay_groups
from .ranks import Group


class State:
    """Networks, optimisers, average, meters, and how far the run is."""

    def __init__(
        self,
        recipe: Recipe,
        group: Group,
        classes: int,
        sources: Mapping[str, str],
        labels: Tensor | None = None,
    ) -> None:
        """`sources` name the data; a checkpoint made from other data will not be resumed.

        `labels` are the training set's, None for a state that only evaluates.
        """
        self.recipe, self.group, self.classes = recipe, group, classes
        seed(recipe.run.seed)  # the same random weights in every process
        self.distiller = build(recipe, classes, group.device, labels)
        self.branches = self.distiller.parts
        self.averages = {
            name: EMA(branch.deployed, recipe.optim.ema)
            for name, branch in self.branches.items()
            if recipe.optim.ema is not None
        }
        for name, average in self.averages.items():
            self.branches[name].follow(average.module)
        self.distiller.prepare(recipe.run.compile)
        self.optimizers = {
            f"{prefix(name)}{network}": build_optimizer(
                recipe.optim, decay_groups(recipe.optim, modules)
            )
            for name, branch in self.branches.items()
            for network, modules in _trained(branch).items()
        }
        self.meters = Meters(group)
        self.done = 0  # finished steps
        self.results: dict[str, dict[str, float]] = {}  # the best and the last evaluation
        self.sources = {**sources, "teacher's weights": self.distiller.teacher_digest}
        self.machine = resume.machine(group)
        seed(recipe.run.seed + group.rank)  # dropout differs between processes

    def networks(self) -> dict[str, tuple[nn.Module, str]]:
        """Everything that is evaluated, by the name in logs, each with its role in `inputs`."""
        found = self.distiller.networks()
        for name, average in self.averages.items():
            found[f"{prefix(name)}ema"] = (average.module, role(name, "student"))
        return found

    def average_batchnorm(self) -> None:
        """Give all processes the same running statistics, before anything reads them."""
        self.group.average_batchnorm(self.distiller)
        for average in self.averages.values():
            self.group.average_batchnorm(average.module)

    def save(self, folder: Path, name: str) -> None:
        """Write a checkpoint: what a resumed run needs, or for "best" the networks alone.

        Raises Diverged instead when the losses since the last log record, or the weights, are
        not finite.
        """
        best = name == "best"
        self.average_batchnorm()
        self.meters.gather()
        resume.check_finite(self.distiller.parameters(), self.done)
        networks = {name: self._networks(name, whole=not best) for name in self.branches}
        state: dict[str, Any] = {**networks.pop(MAIN), "also": networks}
        if not best:
            state |= {
                "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
                "meters": self.meters.state_dict(),
                "rng": self.group.all(rng.capture()),
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
            checkpoint.save(folder, name, state, facts, keep=self.recipe.run.keep)

    def restore(self, folder: Path) -> list[str]:
        """Go on from the newest good checkpoint, if there is one; notes for the log.

        Raises ValueError when data or teacher are not those of the checkpoint.
        """
        found = checkpoint.latest(folder)
        if found is None:
            return []
        state, facts = found.state, found.facts
        resume.check_same_run(found, self.sources, self.recipe)
        self.load_networks(state)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.meters.load_state_dict(state["meters"])
        if self.group.rank < len(state["rng"]):
            rng.restore(state["rng"][self.group.rank])
        self.done, self.results = facts["step"], facts["results"]
        return resume.notes(found, self.machine)

    def load_networks(self, state: dict[str, Any]) -> None:
        """Take the weights of everything that is trained from a checkpoint."""
        for name, held in {MAIN: state, **state["also"]}.items():
            self.branches[name].load(held)
            if name in self.averages:
                self.averages[name].load_state_dict(held["ema"])

    def _networks(self, name: str, whole: bool) -> dict[str, Any]:
        """What a checkpoint holds of a branch; the head only where it is `whole` or deployed."""
        branch = self.branches[name]
        average = self.averages.get(name)
        head = branch.head if whole or branch.method.deploys_head else None
        return {
            "student": branch.student.state_dict(),
            "slts": [slt.state_dict() for slt in branch.slts],
            "head": None if head is None else head.state_dict(),
            "ema": None if average is None else average.state_dict(),
        }


def _trained(branch: Branch) -> dict[str, list[nn.Module]]:
    """The modules of each optimiser: the student with its head, and every SL-T."""
    heads = [] if branch.head is None else [branch.head]
    slts: dict[str, list[nn.Module]] = {f"slt{i}": [slt] for i, slt in enumerate(branch.slts)}
    return {"student": [branch.student, *heads], **slts}
