"""A captured step: it trains as the step itself, for every method, and what cannot be captured."""

import pytest
import torch
from replayed import ReplayedOps
from test_every_method import images, narrow_plain_networks, recipe_for  # noqa: F401

from kdfuse.engine.data.loaders.ondevice import Mixing
from kdfuse.engine.methods import METHODS
from kdfuse.engine.recipe.load import Recipe, load
from kdfuse.engine.recipe.schema import RecipeError
from kdfuse.engine.training.captured import WARM_UP, Captured
from kdfuse.engine.training.classification import begin, step_of
from kdfuse.engine.training.ranks import join
from kdfuse.kernels import op

pytestmark = pytest.mark.slow(30)
STEPS = WARM_UP + 4
CLASSES, BATCH = 10, 16


def trained(recipe, captured):
    """Weights, optimisers' states, averages and sums after some steps, each of another batch."""
    group = join("cpu")
    labels = torch.arange(4 * BATCH) % CLASSES
    distiller, state = begin(recipe, group, CLASSES, labels, {})
    mixing = Mixing(recipe.data, CLASSES, BATCH, recipe.run.seed)
    step = step_of(distiller.train(), state, mixing)
    graph = ReplayedOps()
    if captured:
        step = Captured(step, state.optimizers.values(), graph)
    logged = []
    for number in range(STEPS):
        epoch = 7.0 * number
        numbers = distiller.schedule(epoch) | mixing.schedule(int(epoch), number)
        state.begin(0.01 / (1 + number), numbers)
        rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(number))[:BATCH]
        terms = step(state.now, images(recipe, BATCH, number), labels[rows], rows)
        logged.append({name: value.item() for name, value in terms.items()})
        state.done += 1
    assert graph.replays == captured * (STEPS - WARM_UP)
    return {
        "weights": distiller.weights(whole=True),
        "optimizers": [o.state_dict()["state"] for o in state.optimizers.values()],
        "meters": state.meters.read(),
        "logged": logged,
    }


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """On a CPU a loss looks at the gradient's factor, and leaves out a product with 1."""

    def scaled(gradients, factor):
        return [g * (factor if factor.dim() == 0 else factor[:, None]) for g in gradients]

    monkeypatch.setattr(op, "scaled", scaled)


def changed(recipe, **sections):
    raw = recipe.model_dump()
    for name, values in sections.items():
        raw[name] |= values
    return Recipe.model_validate(raw)


def check(recipe):
    recipe = changed(recipe, optim={"ema": 0.9, "clip": 5.0})
    # All but equal: an op of a step as one of several may round its sums in another order.
    found = trained(recipe, True)
    torch.testing.assert_close(found, trained(recipe, False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.waits])
def test_a_captured_step_trains_as_the_step_itself(name, tmp_path):
    check(recipe_for(name, tmp_path))


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}},
        {"optim": {"name": "adamw", "weight_decay": 0.05, "decay": "matrices"}},
        {"run": {"accumulate": 4}},
        {"run": {"amp": "bf16"}},
    ],
    ids=str,
)
def test_so_it_does_with_any_setting(sections, tmp_path):
    check(changed(recipe_for("slkd", tmp_path), **sections))


def test_what_is_read_on_the_host_would_be_seen():
    def step(now, x):
        return {"found": x * now["own"], "wrong": x * float(now["own"].numpy())}

    captured = Captured(step, [], ReplayedOps())
    number = torch.ones(())
    for value in range(1, WARM_UP + 4):
        number.fill_(value)
        terms = captured({"own": number}, torch.tensor([2.0]))
        assert terms["found"] == 2 * value
    assert terms["wrong"] != terms["found"]


def test_a_step_that_waits_says_so():
    captured = Captured(lambda now, x: {"loss": x / x.item()}, [], ReplayedOps())
    for _ in range(WARM_UP):
        captured({}, torch.ones(()))
    with pytest.raises(RuntimeError, match=r"run.capture.*cannot be recorded.*capture=false.*host"):
        captured({}, torch.ones(()))


def test_a_batch_of_another_shape_is_refused():
    captured = Captured(lambda now, x: {"loss": x.sum()}, [], ReplayedOps())
    for _ in range(WARM_UP + 1):
        captured({}, torch.ones(4, 3))
    for other in (torch.ones(1, 3), torch.ones(4, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"batches of torch.float32 \(4, 3\), got"):
            captured({}, other)


def test_where_it_cannot_be(tmp_path):
    recipe = changed(recipe_for("kd", tmp_path), run={"capture": True})
    with pytest.raises(ValueError, match="run.capture=true records.*on the CPU.*capture=false"):
        trained(recipe, False)
    for name, why in {
        "cifar100/kdsvd": "method kdsvd waits for the device",
        "cifar100/kd:resnet56-resnet20": "optim.name lars takes its rate from the host",
        "coco/kd:resnet101-resnet50": "true has no effect with task detection",
    }.items():
        words = ["run.capture=true", *(["optim.name=lars"] if "lars" in why else [])]
        with pytest.raises(RecipeError, match=f"run.capture: {why}"):
            load(name, words)
