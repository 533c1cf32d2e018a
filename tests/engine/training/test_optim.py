"""Optimisers against their formulas, clipping, the average of weights."""

import copy
import math

import pytest
import torch
from steps import begun_step, set_rates
from tiny import tiny
from torch import nn

from kdfuse.engine.models import Taps, create
from kdfuse.engine.recipe.optim import Optim
from kdfuse.engine.training.classification import begin
from kdfuse.engine.training.ema import EMA
from kdfuse.engine.training.optim import build_optimizer, clip_gradients
from kdfuse.engine.training.ranks import join


def quadratic(optimizer, parameter, steps):
    """Steps on sum(w^4) / 4, whose gradient w^3 changes with w."""
    for _ in range(steps):
        optimizer.zero_grad()
        (parameter**4).sum().div(4).backward()
        optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_formula(nesterov):
    optim = Optim(lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.01)
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = build_optimizer(optim, [parameter])
    w, v = parameter.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for step in range(4):
        g = w**3 + 0.01 * w
        v = g if step == 0 else 0.8 * v + g
        w = w - 0.1 * (g + 0.8 * v if nesterov else v)
    quadratic(optimizer, parameter, 4)
    torch.testing.assert_close(parameter.data, w, rtol=1e-12, atol=0)


def test_adamw_formula():
    optim = Optim(name="adamw", lr=0.1, betas=(0.8, 0.9), weight_decay=0.05)
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = build_optimizer(optim, iter([parameter]))
    w = parameter.detach().clone()
    m, s = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 5):
        g = w**3
        m, s = 0.8 * m + 0.2 * g, 0.9 * s + 0.1 * g * g
        w = w * (1 - 0.1 * 0.05)
        w = w - 0.1 * (m / (1 - 0.8**step)) / ((s / (1 - 0.9**step)).sqrt() + 1e-8)
    quadratic(optimizer, parameter, 4)
    torch.testing.assert_close(parameter.data, w, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_where_torch_has_it(name):
    optim = Optim(name=name, lr=0.1)
    on_cpu = build_optimizer(optim, [nn.Parameter(torch.zeros(2))])
    assert on_cpu.param_groups[0]["fused"] is True
    elsewhere = build_optimizer(optim, [nn.Parameter(torch.zeros(2, device="meta"))])
    assert elsewhere.param_groups[0]["fused"] is False


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars"])
def test_optimizer_goes_on_bit_for_bit_from_its_state(name):
    optim = Optim(name=name, lr=0.01)
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(50))
    optimizer = build_optimizer(optim, [whole])
    quadratic(optimizer, whole, 3)
    resumed = nn.Parameter(whole.detach().clone())
    second = build_optimizer(optim, [resumed])
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    quadratic(optimizer, whole, 3)
    quadratic(second, resumed, 3)
    assert torch.equal(whole, resumed)


def test_set_lr():
    optimizer = build_optimizer(Optim(lr=0.1), [nn.Parameter(torch.zeros(1))])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.5})
    set_rates([optimizer], 0.25)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.25, 0.125]


def moved(model):
    """Change every parameter and buffer, the integer counters too, as a training step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.train()(torch.randn(2, 3, 32, 32))


def test_ema_formula_and_buffers():
    torch.manual_seed(0)
    model = create("resnet8", 10)
    ema = EMA(model, decay=0.3)
    expected = model.fc.weight.detach().double()
    for n in range(6):
        moved(model)
        keep = min(0.3, (1 + n) / (10 + n))  # 0.1, 0.18, 0.25, 0.3 from then on
        expected = keep * expected + (1 - keep) * model.fc.weight.detach().double()
        ema.update(model, torch.tensor(ema.share()))
    torch.testing.assert_close(ema.module.fc.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.module.bn1.num_batches_tracked == 6
    for ours, theirs in zip(ema.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_ema_goes_on_bit_for_bit_from_its_state():
    torch.manual_seed(0)
    model = create("resnet8", 10)
    whole = EMA(model, decay=0.9)
    moved(model)
    whole.update(model, torch.tensor(whole.share()))
    state = {"module": {k: v.clone() for k, v in whole.state_dict()["module"].items()}}
    resumed = EMA(create("resnet8", 10), decay=0.9)
    resumed.load_state_dict(state | {"updates": whole.state_dict()["updates"]})
    for _ in range(3):
        moved(model)
        for average in (whole, resumed):
            average.update(model, torch.tensor(average.share()))
    assert resumed.updates == whole.updates == 4
    for (key, a), (_, b) in zip(
        whole.module.state_dict().items(), resumed.module.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key


def test_ema_of_a_compiled_and_tapped_model_is_a_network_of_its_own():
    model = create("resnet8", 10)
    taps = Taps(model, ["layer2"])
    model.compile(backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    model(x)
    ema = EMA(model, decay=0.9)
    assert list(ema.module.state_dict()) == list(model.state_dict())
    before = model.fc.weight.detach().clone()
    for parameter in ema.module.parameters():
        parameter.zero_()
    assert not ema.module(x).any()
    assert torch.equal(model.fc.weight, before)
    assert taps.take()["layer2"].abs().sum() > 0


@pytest.mark.parametrize("norm", [5.0, 50.0])
def test_clipping_is_by_the_norm_of_all_of_an_optimisers_gradients(norm):
    torch.manual_seed(0)
    values = [torch.randn(3, 4), torch.randn(7), torch.randn(2)]
    parameters = [nn.Parameter(value) for value in values]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = build_optimizer(Optim(lr=0.1), groups)
    gradients = [6 * value for value in values[:2]]  # the last one has none
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient.clone()
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert 5 < whole < 50
    clip_gradients(optimizer, norm)
    for parameter, gradient in zip(parameters, gradients, strict=False):
        torch.testing.assert_close(parameter.grad, gradient * min(1.0, norm / whole))
    assert parameters[2].grad is None


def test_a_step_clips_each_optimiser_for_itself():
    """Plain SGD moves the weights of each network by no more than lr * clip."""
    recipe = tiny(
        None,
        {"name": "dml", "peers": 1},
        slt={"name": "resnet8"},
        data={"source": "synthetic", "classes": 10, "subset": None},
        optim={"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "clip": 0.01},
    )
    distiller, state = begin(recipe, join("cpu"), 10, torch.arange(8), {})
    before = copy.deepcopy(distiller.state_dict())
    step = begun_step(distiller.train(), state)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    step(images, torch.arange(8), torch.arange(8))
    moved = {"tree.main.student.": 0.0, "tree.main.slts.0.": 0.0}
    for name, parameter in distiller.named_parameters():
        (network,) = (prefix for prefix in moved if name.startswith(prefix))
        moved[network] += float((parameter.detach() - before[name]).double().square().sum())
    for square in moved.values():
        assert math.sqrt(square) == pytest.approx(0.5 * 0.01, rel=1e-3)
