"""Every method, by one suite: it learns, resumes to the same bytes, and is exported."""

import shutil
from functools import cache

import pytest
import torch
from steps import begun_step
from tiny import tiny

from kdfuse.engine.cli.export import export
from kdfuse.engine.data.loaders import make_loader
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.methods import METHODS
from kdfuse.engine.models import plain
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.past import checkpoints_of, recipe_of
from kdfuse.engine.training.build import build
from kdfuse.engine.training.classification import begin
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(60)

DATA = {"size": 16, "subset": 5, "augment": "none"}
DATA |= {"scale": (0.08, 1.0)}  # what augment none wants: the default
PLAIN = {
    "student": {"name": "plain18_dirac"},
    "optim": {"lr": 0.01, "schedule": "constant"},
}
GUIDE = {"name": "jointrd_resnet18"}
NARROW = (8, 16, 32, 64)  # channels of the stages of PLAIN and GUIDE, an eighth of what they have
# What a method needs beside a student resnet8 and, where it has one, a teacher resnet14.
NEEDS = {
    "slkd": {"slt": {"name": "resnet8"}},
    "slkd_sequential": {"assistants": [{"name": "resnet14"}, {"name": "resnet8"}]},
    "dgkd": {"assistants": [{"name": "resnet8"}]},
    "dml": {"slt": {"name": "resnet8"}},
    # One batch again and again: its rows of the memory must not move along with the networks.
    "crd": {"method": {"negatives": 32, "momentum": 0.99}},
    "jointrd": {**PLAIN, "teacher": GUIDE, "method": {"feature_weight": 1e-4}},
    "jointrd_ta_released": {**PLAIN, "teacher": GUIDE, "method": {"feature_weight": 1e-4}},
    "jointrd_joint": {**PLAIN, "slt": GUIDE, "method": {"feature_weight": 1e-4}},
}


def recipe_for(name, folder):
    """Two epochs of three steps, with a checkpoint in the second."""
    needs = dict(NEEDS.get(name, {}))
    method = {"name": name, **needs.pop("method", {})}
    if METHODS[name].uses_teacher:
        needs.setdefault("teacher", {"name": "resnet14"})
    needs.setdefault("optim", {"lr": 0.02, "schedule": "constant"})
    data = {**DATA, **needs.pop("data", {})}
    run = {"epochs": 2, "batch": 16, "checkpoint_every": 4, "keep": 9, **needs.pop("run", {})}
    run["eval_batch"] = 25  # the second of an evaluation is smaller
    return tiny(folder / "digits", method, data=data, run=run, **needs)


def images(recipe, n, seed=0):
    size, generator = recipe.data.size, torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module", autouse=True)
def narrow_plain_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_WIDTHS", NARROW)
        yield


@pytest.fixture(scope="module")
def folder(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "digits").symlink_to(few)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """The run of each method, trained when it is first asked for."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = train(recipe_for(name, folder), folder / name)
        return made[name]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_twenty_steps_lower_its_own_loss(name, folder):
    recipe = recipe_for(name, folder)
    manifest = open_source(recipe.data, "train")
    labels = torch.from_numpy(manifest.target)
    distiller, state = begin(recipe, join("cpu"), 10, labels, {})
    loader = make_loader(manifest, recipe.data, recipe.run.batch, seed=0, train=True)
    batch = next(iter(loader.epoch(0)))
    loader.close()
    distiller.train()
    step = begun_step(distiller, state, 100.0)
    losses = []
    for _ in range(20):
        # Well behind every warm-up, so that the weights of the terms stay what they are.
        terms = step(batch.images, batch.target, batch.index)
        losses.append(terms["loss"].item())
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-3:]) < sum(losses[:3])  # measured: 0.88 of it at most
    trained = [p for p in distiller.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_cut_off_in_an_epoch_ends_with_the_same_bytes(name, folder, runs, tmp_path):
    whole = runs(name)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for checkpoint in (cut / "checkpoints").iterdir():
        if checkpoint.name not in ("step-00000004", "best"):
            shutil.rmtree(checkpoint)
    resumed = train(recipe_for(name, folder), cut, resume=True)
    last = "step-00000006"
    (first, facts), (second, other) = (load(run / "checkpoints" / last) for run in (whole, resumed))
    assert facts["results"] == other["results"]
    _same(first, second, "")


def _same(first, second, where):
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            _same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            _same(a, b, f"{where}.{i}")
    else:
        assert first == second, where


@pytest.fixture(scope="module")
def kind_kept(folder):
    """What a method keeps to evaluate: the network's class and the names of its weights."""

    @cache
    def kind(name):
        distiller = build(recipe_for(name, folder), 10, torch.device("cpu"))
        network, _ = distiller.evaluated()["student"]
        return type(network), tuple(network.state_dict())

    return kind


@pytest.mark.parametrize("name", METHODS)
def test_what_is_kept_is_exported_with_equal_outputs(name, kind_kept, runs, tmp_path):
    run = runs(name)
    recipe = recipe_of(run)
    distiller = build(recipe, 10, torch.device("cpu"))
    distiller.load(checkpoints_of(run)["last"][0])
    network, inputs = distiller.evaluated()["student"]
    if name != next(other for other in METHODS if kind_kept(other) == kind_kept(name)):
        return  # a network as the first one's, which takes longer to export than to train
    out = export(run, tmp_path / "model.pt2", which="last")
    given = images(recipe, 5)
    expected = distiller.predict(network.eval(), inputs, given)
    found = torch.export.load(out).module()(given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
