"""A step as a CUDA graph: it ends with the bytes of the same steps without one."""

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("torchvision")
pytest.importorskip("yaml")

from on_gpu import MARKS
from test_every_method import images, narrow_plain_networks, recipe_for  # noqa: F401

from kdfuse.engine.data.loaders.ondevice import Mixing
from kdfuse.engine.methods import METHODS
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.training.captured import WARM_UP, Captured
from kdfuse.engine.training.classification import begin, step_of
from kdfuse.engine.training.process import settings
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.speed import EXACT

pytestmark = MARKS
CLASSES, BATCH = 10, 16


def trained(recipe):
    """The weights, the averages and the window of the meters after some steps."""
    labels = torch.arange(4 * BATCH) % CLASSES
    with settings(recipe.run):
        distiller, state = begin(recipe, join("cuda"), CLASSES, labels, {})
        mixing = Mixing(recipe.data, CLASSES, BATCH, recipe.run.seed)
        step = step_of(distiller.train(), state, mixing)
        assert isinstance(step, Captured) == recipe.run.capture
        for number in range(WARM_UP + 4):
            epoch = 7.0 * number
            numbers = distiller.schedule(epoch) | mixing.schedule(int(epoch), number)
            rows = (torch.arange(BATCH) * 5 + number) % len(labels)
            batch = [x.cuda() for x in (images(recipe, BATCH, number), labels[rows], rows)]
            if number == WARM_UP + 1:  # recorded by now
                torch.cuda.set_sync_debug_mode("error")
            try:
                state.begin(0.01 / (1 + number), numbers)
                step(state.now, *batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            state.done += 1
        values = state.meters.read()
    return distiller.weights(whole=True), values


def changed(recipe, **sections):
    raw = recipe.model_dump()
    for name, values in sections.items():
        raw[name] |= values
    return Recipe.model_validate(raw)


def check(recipe, **run):
    run = {"device": "cuda", **EXACT, **run}
    recipe = changed(recipe, optim={"ema": 0.9, "clip": 5.0}, run=run)
    plain, graph = (trained(changed(recipe, run={"capture": on})) for on in (False, True))
    torch.testing.assert_close(graph, plain, rtol=0, atol=0)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.waits])
def test_a_graph_trains_as_the_step_itself(name, amp, tmp_path):
    check(recipe_for(name, tmp_path), amp=amp)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}},
        {"optim": {"name": "adamw", "weight_decay": 0.05, "decay": "matrices"}},
        {"run": {"accumulate": 4}},
    ],
    ids=str,
)
def test_so_it_does_with_any_setting(sections, tmp_path):
    check(changed(recipe_for("slkd", tmp_path), **sections))
