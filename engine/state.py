"""All that a run changes while it trains, and the way of that into a checkpoint and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, rng
from .distiller import build
from .distributed import Group
from .environment import seed
from .meters import Diverged, Meters
from .optim import EMA, build_optimizer
from .recipe import Recipe
from .rundir import changes, refuse


class State:
    """Networks, optimisers, average, meters, and how far the run is."""

    def __init__(
        self, recipe: Recipe, group: Group, classes: int, sources: Mapping[str, str]
    ) -> None:
        """`sources` name the data; a checkpoint made from other data will not be resumed."""
        self.recipe, self.group, self.classes = recipe, group, classes
        seed(recipe.run.seed)  # the same random weights in every process
        self.distiller = build(
            recipe.method,
            recipe.student,
            recipe.teacher,
            recipe.slt,
            recipe.data,
            recipe.run,
            classes,
            group.device,
        )
        student, slts, heads = self.distiller.student, self.distiller.slts, self.distiller.heads
        self.ema = EMA(student, recipe.optim.ema) if recipe.optim.ema is not None else None
        self.distiller.prepare(recipe.run.compile)
        parameters = {"student": [*student.parameters(), *heads.parameters()]}
        parameters |= {f"slt{i}": list(slt.parameters()) for i, slt in enumerate(slts)}
        self.optimizers = {k: build_optimizer(recipe.optim, p) for k, p in parameters.items()}
        self.meters = Meters(group)
        self.done = 0  # finished steps
        self.results: dict[str, dict[str, float]] = {}  # the best and the last evaluation
        self.sources = {**sources, "teacher's weights": self.distiller.teacher_digest}
        self.machine = {
            "processes": group.world,
            "device": group.device.type,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
        }
        seed(recipe.run.seed + group.rank)  # dropout differs between processes

    def average_batchnorm(self) -> None:
        """Give all processes the same running statistics, before anything reads them."""
        self.group.average_batchnorm(self.distiller)
        if self.ema is not None:
            self.group.average_batchnorm(self.ema.module)

    def save(self, folder: Path, name: str) -> None:
        """Write a checkpoint: what a resumed run needs, or for "best" the networks alone.

        Raises Diverged instead when the losses since the last log record, or the weights, are
        not finite.
        """
        self.average_batchnorm()
        self.meters.gather()
        weights = self.distiller.parameters()
        if not torch.stack([value.isfinite().all() for value in weights]).all():
            raise Diverged(
                f"the weights after step {self.done} are not finite: stopped, checkpoints before "
                "it are kept; lower optim.lr, add optim.warmup_epochs or look at the data"
            )
        state: dict[str, Any] = {
            "student": self.distiller.student.state_dict(),
            "slts": [slt.state_dict() for slt in self.distiller.slts],
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        if name != "best":
            state |= {
                "heads": self.distiller.heads.state_dict(),
                "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
                "meters": self.meters.state_dict(),
                "rng": self.group.all(rng.capture()),
            }
        facts = {
            "step": self.done,
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
        drift = changes(facts["sources"], self.sources)
        refuse(drift, f"cannot resume {found.path}: it was made from other data (was -> is)")
        self.load_networks(state)
        self.distiller.heads.load_state_dict(state["heads"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.meters.load_state_dict(state["meters"])
        if self.group.rank < len(state["rng"]):
            rng.restore(state["rng"][self.group.rank])
        self.done, self.results = facts["step"], facts["results"]
        notes = [f"skipped a damaged checkpoint: {reason}" for reason in found.skipped]
        for line in changes(facts["machine"], self.machine):
            notes.append(f"not bit for bit as it would have been: {line}")
        return [*notes, f"resumed from {found.path.name}"]

    def load_networks(self, state: dict[str, Any]) -> None:
        """Take the student's, the SL-Ts' and the average's weights from a checkpoint."""
        self.distiller.student.load_state_dict(state["student"])
        for slt, weights in zip(self.distiller.slts, state["slts"], strict=True):
            slt.load_state_dict(weights)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
