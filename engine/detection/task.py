"""Detection as a task of the loop: Faster R-CNN under the recipe's method, scored by box AP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

from ..training import process
from ..training.guard import guard_of
from ..training.optim import build_optimizers
from ..training.ranks import Group
from ..training.state import State
from ..training.step import Step
from .coco import Coco, check_same_categories, read_coco
from .evaluate import STATS, check_pycocotools, measure
from .loader import Loader, Sample
from .method import Terms
from .networks import build, check_frozen
from .recipe import DetectionRecipe


class Detection:
    """A recipe's images with their boxes, its detectors and step; see training.task.Task."""

    results: tuple[str, ...] = STATS
    chance = 0.0

    def __init__(self, recipe: DetectionRecipe, group: Group) -> None:
        """Raises ValueError for random weights that would stay so, in a teacher or in a frozen
        part of the student, and what `read_coco` and `create` raise."""
        self.recipe, self.group = recipe, group
        run, data = recipe.run, recipe.data
        check_weights(recipe)
        if data.val:
            check_pycocotools()
        train_set = read_coco(data.root, "train")
        sources = {"training images": train_set.digest}
        with ExitStack() as opened:
            self.loader = opened.enter_context(closing(self._loader(train_set, "batch")))
            if self.loader.steps == 0:
                raise ValueError(
                    f"run.batch={run.batch} is larger than the training set of {len(train_set)} "
                    "images with boxes; lower run.batch"
                )
            self.val: Loader | None = None
            if data.val:
                val_set = read_coco(data.root, "val")
                check_same_categories(train_set, val_set)
                self.val = opened.enter_context(closing(self._loader(val_set, "eval_batch")))
                sources["validation images"] = val_set.digest
            if group.first:
                count = len(self.val.coco) if self.val else 0
                print(
                    f"{len(train_set)} training and {count} validation images of "
                    f"{len(train_set.categories)} categories",
                    flush=True,
                )
            process.seed_weights(run.seed)
            self.networks = build(recipe, len(train_set.categories), group.device)
            self._opened = opened.pop_all()
        self.steps = self.loader.steps
        self.facts: dict[str, Any] = {}
        optimizers = build_optimizers(
            recipe.optim, self.networks.trained(), [self.networks.student]
        )
        categories = len(train_set.categories)
        self.state = State(recipe, group, self.networks, optimizers, categories, sources)
        # Which RoIs are sampled differs between processes.
        process.seed_training(run.seed, group.rank)
        self._step = Step(
            group.wrap(self.networks, run),
            list(optimizers.values()),
            self.state.meters,
            self.networks.update_averages,
            recipe.optim.clip,
            guard=guard_of(recipe.optim, list(optimizers.values()), self.networks),
        )

    def close(self) -> None:
        """Ends the loaders."""
        self._opened.close()

    def identity(self) -> dict[str, Any]:
        """Nothing beside the images, which the state has."""
        return {}

    def check_teachers(self) -> dict[str, float]:
        """Nothing: that a teacher has weights is checked, what it knows shows in its own run."""
        return {}

    def epoch(self, epoch: int, start: int) -> Iterator[list[Sample]]:
        """The batches of an epoch from step `start`; the networks are in training mode."""
        self.networks.train()
        return self.loader.epoch(epoch, start)

    def images(self, epoch: int, number: int) -> list[str]:
        """The files of this process's part of step `number` of `epoch`, both 0-based."""
        return self.loader.names(epoch, number)

    def schedule(self, epoch: int, number: int) -> dict[str, float]:
        """None: a step has its learning rate and what its average takes."""
        return {}

    def step(self, batch: list[Sample]) -> Terms:
        """Train on a batch with the numbers in the state: its detached 0-dim terms."""
        pairs = [sample.on(self.group.device) for sample in batch]
        images, targets = [image for image, _ in pairs], [target for _, target in pairs]
        return self._step(self.state.now, images, targets)

    def evaluate(self) -> dict[str, float]:
        """Percent: `box_ap` of the student, ema_ap and so on of its average."""
        if self.val is None:
            return {}
        return measure(self.networks, self.val.coco, self.val, self.group)

    def _loader(self, coco: Coco, batch: str) -> Loader:
        """This process's loader of a set, of its share of run.batch or run.eval_batch."""
        size = self.group.share(getattr(self.recipe.run, batch), f"run.{batch}")
        seed, rank, world = self.recipe.run.seed, self.group.rank, self.group.world
        return Loader(coco, self.recipe.data, size, seed=seed, rank=rank, world=world)


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
