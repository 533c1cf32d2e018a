"""Recorded answers for the steps of a benchmark, read from their files as a run reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...recipe.load import Recipe
from ...training.recorded import Told


class Answers:
    """Each call gives those to the next step: of the teacher, then of the SL-Ts, as the recipe has
    them. None where all its networks run. They go with whatever images: as fast, and no use."""

    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        """Raises CacheError as a run does, ValueError for answers to batches of another size."""
        self.told, self.device, self.size = Told(recipe), device, recipe.run.batch
        self.step = 0
        for found in self.told.each():
            header = found.header
            for key, own, now in (
                ("run.batch", header.batch, self.size),
                ("data.classes", header.form.classes, classes),
            ):
                if own != now:
                    raise ValueError(f"{key}={now}: {found.folder} was recorded with {own}")

    def __call__(self) -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for found in self.told.each():
            epoch, step = divmod(self.step, found.header.steps)
            made += found.at(epoch, step, range(self.size))
        self.step += 1
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in made)

    def __bool__(self) -> bool:
        return any(True for _ in self.told.each())
