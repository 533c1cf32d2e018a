"""Every method in two processes: nothing hangs or is left without a gradient, and both agree."""

import pytest
import torch
from processes import together
from steps import begun_step
from test_every_method import NARROW, images, recipe_for

from kdfuse.engine.methods import METHODS
from kdfuse.engine.models import plain
from kdfuse.engine.training.classification import begin
from kdfuse.engine.training.ranks import join

pytestmark = pytest.mark.slow(25)


def two_steps(name, group, folder):
    """The largest difference between the processes' trained weights after two steps."""
    recipe = recipe_for(name, folder)
    labels = torch.arange(64) % 10
    distiller, state = begin(recipe, group, 10, labels, {})
    step = begun_step(distiller.train(), state, 1.0)
    for number in range(2):
        index = torch.arange(8) + 16 * number + 8 * group.rank
        given = images(recipe, 8, seed=2 * number + group.rank)
        terms = step(given, labels[index], index)
        assert terms["loss"].isfinite()
    weights = torch.cat([p.detach().flatten() for p in distiller.parameters()])
    other = group.all(weights)[1 - group.rank]
    return (weights - other).abs().max().item()


def of_every_method(folder):
    """What each of the two processes does."""
    group = join("cpu")
    plain._WIDTHS = NARROW  # in a process that does nothing else
    found = {name: two_steps(name, group, folder) for name in METHODS}
    torch.save(found, folder / f"{group.rank}.pt")


def test_two_processes_of_every_method_have_the_same_weights(tmp_path):
    together(2, of_every_method, tmp_path)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == dict.fromkeys(METHODS, 0.0)
