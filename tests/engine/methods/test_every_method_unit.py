"""A step launches the same work every time: what changes it is in its batch and its numbers alone.

That is what a step has to be to be captured, or compiled as one: an op with another number of
Python's in it would be captured with the number that it had.
"""

import pytest
import torch
from test_every_method import images, narrow_plain_networks, recipe_for  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kdfuse.engine.data.loaders.ondevice import Mixing
from kdfuse.engine.methods import METHODS
from kdfuse.engine.training.classification import begin, step_of
from kdfuse.engine.training.ranks import join
from kdfuse.kernels import op

pytestmark = pytest.mark.slow(20)

# These read numbers back.
HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"}
WAITS = {"kdsvd"}  # for its eigenvalues


class Trace(TorchDispatchMode):
    """Ops, with what is no tensor among their arguments."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        shape = tree_map_only(torch.Tensor, lambda x: (tuple(x.shape), x.dtype), (args, kwargs))
        if not op.name().startswith("profiler::"):
            self.ops.append((op.name(), repr(shape)))
        return op(*args, **kwargs)


def traced(recipe, epochs):
    """The ops of a step at each of some epochs, in the course of one run."""
    labels = torch.arange(16) % 10
    distiller, state = begin(recipe, join("cpu"), 10, labels, {})
    mixing = Mixing(recipe.data, 10, 16, recipe.run.seed)
    step = step_of(distiller.train(), state, mixing)
    found = []
    for number, epoch in enumerate(epochs):
        numbers = distiller.schedule(epoch) | mixing.schedule(int(epoch), number)
        state.begin(0.01 / (1 + number), numbers)
        batch = images(recipe, 16), labels, torch.arange(16)
        with Trace() as trace:
            step(state.now, *batch)
        state.done += 1
        found.append(trace.ops)
    return found[2:]  # the first makes the optimiser's state


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """On a CPU a loss looks at the gradient's factor, and leaves out a product with 1."""

    def scaled(gradients, factor):
        return [g * (factor if factor.dim() == 0 else factor[:, None]) for g in gradients]

    monkeypatch.setattr(op, "scaled", scaled)


def check(recipe, waits=False):
    """Nothing but the values of tensors differs between the steps."""
    optim = recipe.optim.model_copy(update={"ema": 0.99, "clip": 5.0})
    recipe = recipe.model_copy(update={"optim": optim})
    first, *others = traced(recipe, [0.0, 0.0, 0.0, 3.5, 30.0, 1000.0])
    for other in others:
        assert first == other
    assert waits or not HOST & {op for op, _ in first}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_same_work_at_any_epoch_and_rate(name, tmp_path):
    check(recipe_for(name, tmp_path), waits=name in WAITS)


@pytest.mark.parametrize("both", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_a_step_is_the_same_work_with_any_mix(both, tmp_path):
    recipe = recipe_for("kd", tmp_path)
    data = recipe.data.model_copy(update=both | {"smoothing": 0.1})
    check(recipe.model_copy(update={"data": data}))
