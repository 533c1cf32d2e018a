"""All that a run of detection changes while it trains, into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..run import checkpoint, resume, rng
from ..run.environment import seed
from ..training.meters import Meters
from ..training.optim import build_optimizer, decay_groups
from ..training.ranks import Group
from .distiller import DetectionDistiller
from .networks import create
from .recipe import DetectionRecipe


class State:
    """Detectors, optimiser, meters, and how far the run is."""

    def __init__(
        self, recipe: DetectionRecipe, group: Group, categories: int, sources: Mapping[str, str]
    ) -> None:
        """`sources` name the data; a checkpoint made from other data will not be resumed."""
        self.recipe, self.group = recipe, group
        run = recipe.run
        seed(run.seed)  # the same random weights in every process
        student = create(recipe.student, recipe.data, categories)
        teacher = create(recipe.teacher, recipe.data, categories) if recipe.teacher else None
        layout = torch.channels_last if run.channels_last else torch.contiguous_format
        for network in (student, teacher):
            if network is not None:
                network.to(group.device).to(memory_format=layout)
        self.distiller = DetectionDistiller(recipe.method, student, teacher)
        self.optimizer = build_optimizer(recipe.optim, decay_groups(recipe.optim, [student]))
        self.meters = Meters(group)
        self.done = 0  # finished steps
        self.results: dict[str, dict[str, float]] = {}  # the best and the last evaluation
        self.sources = {**sources, "teacher's weights": self.distiller.teacher_digest}
        self.machine = resume.machine(group)
        seed(run.seed + group.rank)  # which RoIs are sampled differs between processes

    def save(self, folder: Path, name: str) -> None:
        """Write a checkpoint: what a resumed run needs, or for "best" the student alone.

        Raises Diverged instead when the losses since the last log record, or the weights, are
        not finite.
        """
        self.meters.gather()
        resume.check_finite(self.distiller.parameters(), self.done)
        state: dict[str, Any] = {"student": self.distiller.student.state_dict()}
        if name != "best":
            state |= {
                "optimizer": self.optimizer.state_dict(),
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
        resume.check_same_run(found, self.sources, self.recipe)
        self.distiller.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meters.load_state_dict(state["meters"])
        if self.group.rank < len(state["rng"]):
            rng.restore(state["rng"][self.group.rank])
        self.done, self.results = facts["step"], facts["results"]
        return resume.notes(found, self.machine)
