"""A step with a loss or gradients that are not finite leaves everything as it was."""

import copy
import math

import pytest
import torch
from processes import together
from replayed import ReplayedOps
from steps import tensors
from test_every_method import narrow_plain_networks, recipe_for  # noqa: F401
from test_resume import assert_same
from tiny import tiny
from torch import nn

from kdfuse.engine.data.loaders.ondevice import Mixing
from kdfuse.engine.methods import METHODS
from kdfuse.engine.methods.crd import Memory
from kdfuse.engine.recipe.optim import Optim
from kdfuse.engine.recipe.run import Run
from kdfuse.engine.training.captured import WARM_UP, Captured
from kdfuse.engine.training.classification import begin, step_of
from kdfuse.engine.training.guard import Guard, raw, writable
from kdfuse.engine.training.meters import Meters, NotFinite
from kdfuse.engine.training.optim import build_optimizer
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.step import Step
from kdfuse.kernels import op

pytestmark = pytest.mark.slow(20)

CLASSES, ROWS = 10, 8
SETTINGS = {
    "sgd": ("kd", {}),
    "nesterov, clipped": ("kd", {"optim": {"nesterov": True, "clip": 1.0, "weight_decay": 0.0}}),
    "adamw": ("kd", {"optim": {"name": "adamw", "weight_decay": 0.05}}),
    "two SL-Ts": ({"name": "slkd", "slts": 2}, {}),
    "in two parts": ("kd", {"run": {"accumulate": 2}}),
}


def recipe_of(method, **changes):
    """Any images; at this decay every update keeps as much of the average, from the first on."""
    optim = {"lr": 0.05, "ema": 0.05, **changes.pop("optim", {})}
    data = {"source": "synthetic", "classes": CLASSES, "subset": None}
    run = {"batch": ROWS, **changes.pop("run", {})}
    return tiny(None, method, data=data, optim=optim, run=run, **changes)


class Trained:
    """A run's networks with the step that trains them, whose student can be broken."""

    def __init__(self, recipe, graph=None, device="cpu"):
        self.rows, self.size = recipe.run.batch, recipe.data.size
        labels = torch.arange(4 * self.rows) % CLASSES
        self.group = join(device)
        self.networks, self.state = begin(recipe, self.group, CLASSES, labels, {})
        self.mixing = Mixing(recipe.data, CLASSES, self.rows, recipe.run.seed)
        self.step = step_of(self.networks.train(), self.state, self.mixing)
        if graph is not None:
            self.step = Captured(self.step, self.state.optimizers.values(), graph)
        self.factor = torch.ones((), device=self.group.device)  # of what the student is given
        self.networks.main.student.register_forward_pre_hook(lambda _, x: (x[0] * self.factor,))

    def train(self, steps, bad=()):
        """Takes the batches of these numbers, the student being broken in some."""
        for number in steps:
            chance = torch.Generator().manual_seed(number)
            shape = self.rows, 3, self.size, self.size
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=chance)
            rows = torch.randperm(4 * self.rows, generator=chance)[: self.rows]
            self.factor.fill_(math.nan if number in bad else 1.0)
            self.state.begin(0.05, self.networks.schedule(0.0) | self.mixing.schedule(0, 0))
            batch = (part.to(self.group.device) for part in (images, rows % CLASSES, rows))
            self.step(self.state.now, *batch)
            self.state.done += 1

    def held(self):
        """All that training changes, but for how often: weights, buffers, averages, momenta."""
        held = self.networks.weights(whole=True)
        held["ema"].pop("updates")
        states = {k: o.state_dict()["state"] for k, o in self.state.optimizers.items()}
        return copy.deepcopy({"weights": held, "optimizers": states})


@pytest.mark.parametrize("name", SETTINGS)
def test_it_goes_on_as_if_the_batch_had_not_been_there(name):
    method, changes = SETTINGS[name]
    run, other = (Trained(recipe_of(method, **changes)) for _ in range(2))
    run.train(range(4), bad=[0])  # torch's fused SGD would leave its momentum as memory was
    other.train(range(1, 4))
    before = run.held()
    assert_same(before, other.held())
    run.train([4, 5], bad=[4, 5])
    assert_same(run.held(), before)
    run.train([6])
    other.train([6])
    assert_same(run.held(), other.held())
    found = run.state.meters.read()
    assert found.pop("skipped") == 3
    assert found == other.state.meters.read()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.waits])
def test_it_changes_nothing_by_any_method(name, tmp_path):
    recipe = recipe_for(name, tmp_path)
    optim = recipe.optim.model_copy(update={"ema": 0.05})
    run = Trained(recipe.model_copy(update={"optim": optim}))
    run.train([0, 1])

    def everything():
        return copy.deepcopy([run.held(), dict(run.networks.named_buffers())])

    before = everything()
    run.train([2], bad=[2])
    assert_same(everything(), before)
    run.train([3])
    assert all(value.isfinite().all() for value in run.networks.parameters())
    assert run.state.meters.read()["skipped"] == 1


def test_a_memory_of_images_and_what_it_is_scaled_by_stay():
    run = Trained(recipe_of("crd"))
    head = run.networks.main.head
    assert isinstance(head, Memory)
    began = run.held()["weights"]
    run.train([0], bad=[0])
    assert_same(run.held()["weights"], began)
    run.train([1, 2])
    before = run.held()
    memory, was = (w["head"]["student_memory"] for w in (before["weights"], began))
    assert not torch.equal(memory, was)
    assert (before["weights"]["head"]["normalizers"] > 0).all()
    run.train([3], bad=[3])
    assert_same(run.held(), before)


def test_without_it_they_are_lost():
    run = Trained(recipe_of("crd", optim={"skip_limit": 0}))
    run.train([0, 1], bad=[1])
    held = run.held()
    assert not held["weights"]["student"]["conv1.weight"].isfinite().any()
    with pytest.raises(NotFinite, match=r"^the loss of step 2 is not finite \(rank 0: loss"):
        run.state.meters.read()


def test_a_captured_step_skips_too_and_is_recorded_anew_behind_a_load(as_on_a_device):
    graph = ReplayedOps()
    run, other = Trained(recipe_of("kd"), graph), Trained(recipe_of("kd"))
    run.train(range(WARM_UP + 2), bad=[0])
    assert graph.replays == 2
    before = run.held()
    run.train([6, 7], bad=[6, 7])
    assert_same(run.held(), before)
    run.train([8])
    other.train([*range(1, WARM_UP + 2), 8])
    for optimizer in run.state.optimizers.values():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run.train(range(9, 9 + WARM_UP))
    assert graph.replays == 5
    run.train([12, 13, 14], bad=[13])
    assert graph.replays == 8
    other.train([9, 10, 11, 12, 14])
    torch.testing.assert_close(run.held(), other.held(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """On a CPU a loss looks at the gradient's factor, and leaves out a product with 1."""
    monkeypatch.setattr(op, "scaled", lambda gradients, factor: [g * factor for g in gradients])


class Loss(nn.Module):
    """A loss that is infinite by a constant: its gradients are finite."""

    def __init__(self, constant):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 1), nn.BatchNorm1d(3)
        self.constant = constant

    def forward(self, now, x):
        loss = self.layer(self.norm(x)).square().mean() + self.constant
        return loss, {"loss": loss.detach(), "rows": torch.tensor(float(len(x)))}


def steps_of(constants, rows=5, rank=0, wrap=lambda module: module, **settings):
    """Steps whose losses have these constants: weights after each, and the meters."""
    torch.manual_seed(0)
    model = Loss(0.0)
    optimizer = build_optimizer(Optim(lr=0.1), model.parameters())
    meters = Meters(join("cpu"), limit=3)
    guard = Guard([optimizer], model.modules())
    step = Step(wrap(model), [optimizer], meters, guard=guard, **settings)
    weights = []
    for number, constant in enumerate(constants, 1):
        model.constant = constant
        x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(10 * number + rank))
        step(tensors({"step": number}), x)
        weights.append(copy.deepcopy(model.state_dict()))
    return weights, meters


@pytest.mark.parametrize("constant", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_with_gradients_that_are(constant):
    (first, second, third), meters = steps_of([0.0, constant, 0.0])
    assert_same(dict(first), dict(second))
    assert not torch.equal(second["layer.weight"], third["layer.weight"])
    assert meters.faults.last(meters.names) == (2, 1, {0: ["loss"]})


def of_two(folder, settings):
    """Ranks with six and four rows, of which the second alone has a bad loss in step 2."""
    group, run = join("cpu"), Run(epochs=1, batch=10, **settings)
    rows = 6 - 2 * group.rank
    weights, meters = steps_of(
        [0.0, math.inf if group.rank else 0.0, 0.0],
        rows,
        group.rank,
        lambda module: group.wrap(module, run),
        parts=run.accumulate,
        weight=rows * group.world / 10,
    )
    row = meters.faults.last(meters.names)
    values = meters.read()
    torch.save([weights, values, tuple(row)], folder / f"{group.rank}.pt")


@pytest.mark.parametrize("settings", [{}, {"reduce": "bf16"}, {"accumulate": 2}], ids=str)
def test_all_ranks_skip_a_step_that_is_bad_on_one(settings, tmp_path):
    together(2, of_two, tmp_path, settings)
    (one, values, row), (other, *same) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert [values, row] == same and values["skipped"] == 1 and row == (2, 1, {1: ["loss"]})
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine["layer.weight"], theirs["layer.weight"])
    for weights in (one, other):
        assert_same(dict(weights[0]), dict(weights[1]))  # each its own running statistics
        assert not torch.equal(weights[1]["layer.weight"], weights[2]["layer.weight"])


def test_rows_are_counted_and_the_first_of_one_that_is_too_long_is_kept():
    _, meters = steps_of([0.0, math.nan, math.nan, math.nan, 0.0, math.inf])
    assert meters.faults.last(meters.names) == (6, 3, {0: ["loss"]})
    assert meters.read()["skipped"] == 4
    meters.faults.limit = 1  # a row of before the record is no matter for a lower limit
    assert "skipped" not in meters.read()
    _, meters = steps_of([0.0, *4 * [math.nan], 0.0, math.inf])
    text = r"4 steps in a row were skipped, from step 2 on.*\(rank 0: loss\)"
    with pytest.raises(NotFinite, match=text):
        meters.check()


def test_a_window_of_which_no_step_counts_has_no_means():
    _, meters = steps_of([math.nan, math.nan])
    values = meters.read()
    assert values["skipped"] == 2 and math.isnan(values["loss"])
    assert math.isnan(meters.read_epoch()["loss"])


def test_buffers_of_any_layout_are_seen_as_their_bytes():
    whole = torch.arange(24, dtype=torch.float64).view(1, 2, 3, 4)
    for buffer in (
        whole.to(memory_format=torch.channels_last),
        whole.transpose(1, 3),
        torch.tensor(7),
        torch.zeros(0),
        torch.tensor([True, False]),
    ):
        assert writable(buffer)
        seen = raw(buffer)
        assert seen.data_ptr() == buffer.data_ptr()
        assert seen.dtype == torch.uint8 and len(seen) == buffer.nbytes
    assert not writable(torch.zeros(3, 1).expand(3, 4))


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_other_optimisers_skip_none(name):
    assert Optim(name=name, lr=0.1).skips == 0 and Optim(lr=0.1).skips == 10
    with pytest.raises(ValueError, match=f"skip_limit: 5 has no effect with optim.name {name}"):
        Optim(name=name, lr=0.1, skip_limit=5)
    with pytest.raises(ValueError, match=r"optim.rollback_lr: 0.5 .* optim.skip_limit 0"):
        Optim(lr=0.1, skip_limit=0, rollback_lr=0.5)
