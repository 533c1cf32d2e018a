"""Steps whose numbers are those of one epoch, as tests take them."""

import torch

from kdfuse.engine.data.loaders.ondevice import Mixing
from kdfuse.engine.training.classification import step_of
from kdfuse.engine.training.meters import Meters
from kdfuse.engine.training.optim import rates, set_lr
from kdfuse.engine.training.ranks import Group
from kdfuse.engine.training.scalars import Scalars
from kdfuse.engine.training.step import Step


def tensors(numbers):
    """As 0-dim tensors."""
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in numbers.items()}


def loss_of(learner, out, target, epoch=0.0):
    """Loss and terms of a method, or of a learner, at an epoch."""
    method = getattr(learner, "method", learner)
    return learner.loss(out, target, tensors(method.schedule(epoch)))


def step_with(optimizer, distiller, epoch=0.0):
    """Trains on (images, target, index) by this optimiser alone."""
    step = Step(distiller, [optimizer], Meters(Group(0, 1, torch.device("cpu"))))
    now = tensors(distiller.schedule(epoch) | {"step": 1})
    return lambda *batch: step(now, *batch)


def set_rates(optimizers, lr):
    """As a step gets them before it begins."""
    now = Scalars(torch.device("cpu"))
    now.write(rates(optimizers, lr))
    for optimizer in optimizers:
        set_lr(optimizer, lr, now)


def begun_step(distiller, state, epoch=0.0, lr=None):
    """Trains on (images, target, index) as a run does, by default at the recipe's own rate."""
    recipe = state.recipe
    mixing = Mixing(recipe.data, state.classes, recipe.run.batch, recipe.run.seed)
    step = step_of(distiller, state, mixing)

    def once(*batch):
        numbers = distiller.schedule(epoch) | mixing.schedule(int(epoch), state.done)
        state.begin(recipe.optim.lr if lr is None else lr, numbers)
        terms = step(state.now, *batch)
        state.done += 1
        return terms

    return once
