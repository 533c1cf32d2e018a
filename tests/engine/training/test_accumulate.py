"""run.accumulate: a step in several parts has the gradients, terms and weights of the whole one."""

import pytest
import torch
from steps import tensors
from tiny import tiny

from kdfuse.engine.data.loaders.ondevice import Mixing
from kdfuse.engine.recipe.load import Recipe, load
from kdfuse.engine.recipe.schema import RecipeError
from kdfuse.engine.training.classification import begin, step_of
from kdfuse.engine.training.meters import Meters
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.step import Step

BATCH, CLASSES = 24, 10
DATA = {"source": "synthetic", "classes": CLASSES, "subset": None}


def batch():
    source = torch.Generator().manual_seed(0)
    shape = BATCH, 3, 16, 16
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
    return images, torch.arange(BATCH) % CLASSES, torch.arange(BATCH)


def begun(method, **sections):
    recipe = tiny(None, method, data=DATA, **sections)
    distiller, state = begin(recipe, join("cpu"), CLASSES, batch()[1], {})
    return recipe, distiller, state


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("method", ["ce", "kd", "dkd", "slkd"])
def test_gradients_and_terms_are_those_of_the_whole_batch(method, parts):
    found = []
    for count in (1, parts):
        _, distiller, state = begun(method)
        distiller.eval()  # in training, BatchNorm's statistics are those of a part
        step = Step(distiller, list(state.optimizers.values()), Meters(join("cpu")), parts=count)
        terms = step(tensors(distiller.schedule(0.0) | {"step": 1}), *batch())
        gradients = {name: p.grad for name, p in distiller.named_parameters()}
        found.append((gradients, terms, step.meters.read()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)
    assert found[1][1]["rows"] == BATCH


def test_a_step_in_parts_is_one_step_of_the_optimisers():
    _, distiller, state = begun("kd", optim={"name": "adamw"})
    step = Step(distiller, list(state.optimizers.values()), Meters(join("cpu")), parts=4)
    for number in (1, 2):
        step(tensors(distiller.schedule(0.0) | {"step": number}), *batch())
    steps = [s["step"].item() for s in state.optimizers["student"].state_dict()["state"].values()]
    assert set(steps) == {2}


def test_what_does_not_divide_is_refused():
    run = {"batch": BATCH, "accumulate": 5}
    recipe, distiller, state = begun("kd", run=run)
    with pytest.raises(
        ValueError, match=r"run.batch: 24 images do not go round 1 processes in units of 5"
    ):
        step_of(distiller, state, Mixing(recipe.data, CLASSES, BATCH, 0))


def test_what_compares_all_images_of_a_step_is_refused():
    words = ["run.accumulate=2", "method.gather=true"]
    with pytest.raises(RecipeError, match=r"method.gather: the images of a step, of which run.acc"):
        load("cifar100/sp:resnet56-resnet20", words)
    assert isinstance(load("cifar100/sp:resnet56-resnet20", words[:1]), Recipe)
    with pytest.raises(RecipeError, match=r"run.accumulate: 2 has no effect with task detection"):
        load("coco/kd:resnet101-resnet50", words[:1])
