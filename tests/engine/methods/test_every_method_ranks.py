"""Every method in several processes: nothing hangs or is left without a gradient, all agree, and
where a method says so, the gradients are those of one process with all of the batch."""

import pytest
import torch
from processes import together
from steps import begun_step
from test_every_method import NARROW, images, narrow_plain_networks, recipe_for  # noqa: F401

from kdfuse.engine.methods import METHODS
from kdfuse.engine.models import plain
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.training.classification import begin
from kdfuse.engine.training.inputs import part_of
from kdfuse.engine.training.ranks import Group, join

pytestmark = pytest.mark.slow(25)

# Whose loss of a batch is no mean over its rows, and why.
OF_A_BATCH = {
    "tf_nkd": "weights of rows are over their mean in the batch",
    "uskd": "weights of rows are over their mean in the batch",
    "dgkd": "each process draws which of the teachers it leaves out",
    "crd": "negatives are drawn by each process",
}
# Options under which it is; `gather` is one of relations.
WHOLE = {
    "rkd": {"gather": True},
    "sp": {"gather": True},
    "pkt": {"gather": True},
    "dist": {"gather": True},
}


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


def gradients(name, group, folder, batch, **run):
    """Of a process's part of a batch, with the running statistics of BatchNorm."""
    recipe = recipe_for(name, folder)
    method = {**recipe.method.model_dump(), **WHOLE.get(name, {})}
    raw = recipe.model_dump() | {"method": method}
    raw["run"] |= {"batch": batch, **run}
    recipe = Recipe.model_validate(raw)
    labels = torch.arange(batch) % 10
    distiller, state = begin(recipe, group, 10, labels, {})
    step = begun_step(distiller.eval(), state, 1.0, lr=1e-12)
    part = part_of(recipe, group)
    own = slice(part.start, part.stop)
    step(images(recipe, batch)[own], labels[own], torch.arange(batch)[own])
    return {n: p.grad.clone() for n, p in distiller.named_parameters() if p.requires_grad}


def of_parts(folder, batch):
    """What each process does."""
    group = join("cpu")
    plain._WIDTHS = NARROW
    names = [name for name in METHODS if name not in OF_A_BATCH and name not in WHOLE]
    if batch % group.world == 0:  # as those want it that gather; the others take any share
        names = ["slkd", *WHOLE]
    found = {name: gradients(name, group, folder, batch) for name in names}
    found["bf16"] = gradients("slkd", group, folder, batch, reduce="bf16")
    if group.first:
        torch.save(found, folder / "parts.pt")


@pytest.mark.parametrize(("world", "batch"), [(2, 12), (3, 13)])
def test_the_gradients_are_those_of_one_process_with_all_images(world, batch, tmp_path):
    together(world, of_parts, tmp_path, batch)
    found = torch.load(tmp_path / "parts.pt")
    bf16 = found.pop("bf16")
    wrong = {}
    for name, parts in found.items():
        alone = gradients(name, join("cpu"), tmp_path, batch)
        apart = {k: (parts[k] - v).norm() / (v.norm() + 1e-6) for k, v in alone.items()}
        if (most := max(apart.values())) > 2e-3:
            wrong[name] = most.item()
    assert wrong == {}
    for key, value in found["slkd"].items():  # an eps of bfloat16 for each process, and the sum
        torch.testing.assert_close(bf16[key], value, rtol=0.02, atol=0.01 * value.abs().max())
    assert any(not torch.equal(bf16[key], value) for key, value in found["slkd"].items())


def test_a_method_that_gathers_wants_as_many_images_of_each(tmp_path):
    group = Group(0, 3, torch.device("cpu"))
    sp = recipe_for("sp", tmp_path)
    assert part_of(sp, group) == range(5)
    gathering = Recipe.model_validate(
        sp.model_dump() | {"method": {**sp.method.model_dump(), "gather": True}}
    )
    for recipe in (gathering, recipe_for("crd", tmp_path)):
        name = recipe.method.name
        with pytest.raises(ValueError, match=f"run.batch=16: method {name} gathers as many images"):
            part_of(recipe, group)
