"""The step that `kdfuse train` takes, on synthetic batches that lie on the device already."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...data.batch import Batch
from ...data.loaders.ondevice import Mixing
from ...methods import Outputs, Terms
from ...recipe.load import Recipe
from ...training.classification import begin, step_of
from ...training.ranks import Group
from ...training.rate import lr_at
from .answers import Answers
from .cases import Case

BATCHES = 4  # different ones, which are taken in turn


class Images:
    """Synthetic training sets of `BATCHES` batches, each made once and kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def of(self, case: Case) -> tuple[Tensor, Tensor]:
        """(M, 3, H, W) uint8, stored channels last as loaders give them, and labels (M,) int64."""
        count, size = BATCHES * case.recipe.run.batch, case.recipe.data.size
        key = count, size, case.classes
        if key not in self.made:
            chance = torch.Generator().manual_seed(0)
            shape = count, size, size, 3
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=chance)
            target = torch.randint(0, case.classes, (count,), generator=chance)
            self.made[key] = pixels.permute(0, 3, 1, 2).to(self.device), target.to(self.device)
        return self.made[key]


def middle(recipe: Recipe) -> float:
    """The epoch of all steps: half of the run is done, and all warm-ups are over."""
    return recipe.run.epochs / 2


class Step:
    """Each call is a turn of the loop, with all that `kdfuse train` does in one but for loading."""

    def __init__(self, case: Case, made: Images) -> None:
        recipe, size, (pixels, target) = case.recipe, case.recipe.run.batch, made.of(case)
        group = Group(0, 1, made.device)
        self.recipe = recipe
        self.answers = Answers(recipe, case.classes, made.device)
        told, labels = self.answers.told, target.cpu()
        made_of = begin(recipe, group, case.classes, labels, {}, told.cache, told.fused)
        self.networks, self.state = made_of
        told.check_teacher(self.networks)
        index = torch.arange(len(target), device=made.device)
        self.batches: Iterator[Batch] = itertools.cycle(
            Batch(pixels[at : at + size], target[at : at + size], index[at : at + size], size)
            for at in range(0, len(target), size)
        )
        self.mixing = Mixing(recipe.data, case.classes, size, recipe.run.seed)
        self.step = step_of(self.networks, self.state, self.mixing)
        self.epoch = middle(recipe)
        self.networks.train()

    def __call__(self) -> Terms:
        """As Loop.train_epoch and Classification.step."""
        batch, state = next(self.batches), self.state
        state.begin(lr_at(self.recipe.optim, self.recipe.run, self.epoch), self.schedule())
        images, target, index = batch.images, batch.target, batch.index
        terms = self.step(state.now, images, target, index, *self.answers())
        state.done += 1
        return terms

    def schedule(self) -> dict[str, float]:
        """The step's numbers, as of Classification."""
        of_methods = self.networks.schedule(self.epoch)
        return of_methods | self.mixing.schedule(int(self.epoch), self.state.done)


class Forward:
    """Each call is the teacher's part of a step: normalise, and a pass without gradients."""

    def __init__(self, case: Case, made: Images) -> None:
        step = Step(case, made)
        assert step.networks.teacher is not None
        self.networks, self.teacher = step.networks, step.networks.teacher
        self.batches = step.batches
        # The student takes no part, and no memory.
        self.networks.learners.clear()
        self.networks.tree = nn.ModuleDict()

    def __call__(self) -> Tensor:
        return self.networks.predict(self.teacher, "teacher", next(self.batches).images)


def work_of(case: Case, made: Images) -> Step | Forward:
    """What does a case's work once a call."""
    return Forward(case, made) if case.forward else Step(case, made)


def loss_of(step: Step, case: Case) -> Callable[[], None] | None:
    """The loss of a case alone, forward and backward, on logits of its shape and type.

    None where it is made of more than whole logits, or of several students.
    """
    learner = step.networks.main
    if case.recipe.also or any(learner.reads.values()) or learner.head is not None:
        return None
    if case.recipe.assistants or learner.method.uses_average:
        return None
    if not all(found.header.form.whole for found in step.answers.told.each()):
        return None
    batch = next(step.batches)
    step.state.begin(0.0, step.schedule())
    now = dict(step.state.now)
    _, target = step.mixing(now, batch.images, batch.target)
    dtype = torch.bfloat16 if case.recipe.run.amp == "bf16" else torch.float32

    def logits(trained: bool) -> Tensor:
        drawn = torch.randn(len(batch.target), case.classes, device=target.device)
        return drawn.to(dtype).requires_grad_(trained)

    out = Outputs(student=logits(True), slts=[logits(True) for _ in learner.slts])
    if learner.method.uses_teacher:
        out.teacher = logits(False)
    if step.networks.fused is not None:
        out.fused = logits(False).float()
    trained = [out.student, *out.slts]

    def once() -> None:
        loss, _ = learner.loss(out, target, now)
        torch.autograd.grad(loss, trained, allow_unused=True)

    return once
