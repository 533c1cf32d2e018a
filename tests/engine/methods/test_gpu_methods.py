"""Every method on a device: a step that waits for nothing and uses no operation that may vary."""

import pytest
import torch
from steps import begun_step

pytest.importorskip("pydantic")
pytest.importorskip("torchvision")
pytest.importorskip("yaml")

from on_gpu import MARKS
from test_every_method import recipe_for

from kdfuse.engine.methods import METHODS
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.training.classification import begin
from kdfuse.engine.training.process import settings
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.speed import EXACT

pytestmark = MARKS
WAITS = {"kdsvd"}  # for its eigenvalues


def on_cuda(name, folder, **run):
    plain = recipe_for(name, folder).model_dump()
    plain["run"] |= {"device": "cuda", **EXACT, **run}
    return Recipe.model_validate(plain)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_steps_wait_for_nothing_and_lower_the_loss(name, amp, tmp_path):
    recipe = on_cuda(name, tmp_path, amp=amp)
    labels = torch.arange(16) % 10
    with settings(recipe.run):
        distiller, state = begin(recipe, join("cuda"), 10, labels, {})
        step = begun_step(distiller.train(), state, 100.0)
        source = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=source).cuda()
        target, index = labels.cuda(), torch.arange(16).cuda()
        losses = [step(images, target, index)["loss"]]  # sets up what is set up once
        try:
            torch.cuda.set_sync_debug_mode("default" if name in WAITS else "error")
            losses += [step(images, target, index)["loss"] for _ in range(19)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    values = torch.stack(losses).tolist()
    assert all(value == value for value in values)
    assert sum(values[-3:]) < sum(values[:3])


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_end_with_the_same_weights(name, tmp_path):
    recipe = on_cuda(name, tmp_path)
    found = []
    for _ in range(2):
        with settings(recipe.run):
            labels = torch.arange(16) % 10
            distiller, state = begin(recipe, join("cuda"), 10, labels, {})
            step = begun_step(distiller.train(), state, 1.0)
            source = torch.Generator().manual_seed(0)
            images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=source)
            for _ in range(3):
                step(images.cuda(), labels.cuda(), torch.arange(16).cuda())
            found.append(torch.cat([p.flatten() for p in distiller.parameters()]).cpu())
    assert torch.equal(*found)
