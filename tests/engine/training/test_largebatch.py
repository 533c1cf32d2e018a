"""LAMB and LARS against their papers, and whose LAMB is taken."""

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kdfuse.engine.recipe.optim import Optim
from kdfuse.engine.training import largebatch
from kdfuse.engine.training.meters import Meters
from kdfuse.engine.training.optim import build_optimizer, class_of
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.step import Step

timm = pytest.importorskip("timm")

SHAPES = [(3, 4), (5,), (2, 3, 2)]
RATE, DECAY = 0.1, 0.05


def drawn(steps=1):
    """Weights, and gradients of so many steps, float64; the second tensor's weights are 0."""
    chance = np.random.default_rng(0)
    weights = [chance.normal(size=shape) for shape in SHAPES]
    weights[1][:] = 0
    return weights, [[chance.normal(size=shape) for shape in SHAPES] for _ in range(steps)]


def ours(optim, weights, gradients):
    """The weights after the steps of the optimiser; the last tensor is in a group without decay."""
    parameters = [nn.Parameter(torch.tensor(w)) for w in weights]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer = build_optimizer(optim, groups)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return [parameter.detach().numpy() for parameter in parameters]


def ratio(over, under):
    """A quotient of norms, 1 where one of them is 0."""
    return over / under if over > 0 and under > 0 else 1.0


def lamb(w, gradients, decay, adapted, b1=0.8, b2=0.9):
    """Algorithm 2 of You et al. 2020 with phi(z) = z."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-6) + decay * w
        trust = ratio(np.sqrt((w * w).sum()), np.sqrt((r * r).sum())) if adapted else 1.0
        w = w - RATE * trust * r
    return w


def lars(w, gradients, decay, adapted, momentum=0.8, trust=0.02):
    """Algorithm 1 of You et al. 2017; at one rate, so that where it stands makes no difference."""
    v = np.zeros_like(w)
    for g in gradients:
        size, slope = np.sqrt((w * w).sum()), np.sqrt((g * g).sum())
        adapts = adapted and size > 0 and slope > 0
        local = trust * size / (slope + decay * size) if adapts else 1.0
        v = momentum * v + RATE * local * (g + decay * w)
        w = w - v
    return w


@pytest.mark.parametrize("adapt", ["all", "decayed"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    ("formula", "settings"),
    [
        (lamb, {"name": "lamb", "betas": (0.8, 0.9)}),
        (lars, {"name": "lars", "momentum": 0.8, "trust": 0.02}),
    ],
)
def test_steps_are_the_papers(formula, settings, steps, adapt):
    weights, gradients = drawn(steps)
    optim = Optim(lr=RATE, weight_decay=DECAY, adapt=adapt, **settings)
    found = ours(optim, weights, gradients)
    for i, after in enumerate(found):
        decay = DECAY if i < 2 else 0.0
        adapted = adapt == "all" or decay > 0
        expected = formula(weights[i], [step[i] for step in gradients], decay, adapted)
        # timm's LARS has 1e-8 in its denominator.
        np.testing.assert_allclose(after, expected, rtol=1e-7, atol=1e-12)
        assert np.abs(after - weights[i]).max() > 1e-4


def test_a_zero_weight_takes_the_rate_alone():
    weights, gradients = drawn()
    slope = gradients[0][1]
    moved = ours(Optim(name="lars", lr=RATE, momentum=0.0), weights, gradients)[1]
    np.testing.assert_allclose(moved, -RATE * slope, rtol=1e-12)
    moved = ours(Optim(name="lamb", lr=RATE), weights, gradients)[1]
    np.testing.assert_allclose(moved, -RATE * np.sign(slope), rtol=1e-4)  # eps beside |slope|


def test_nesterov_looks_ahead():
    weights, gradients = drawn()
    given = {"name": "lars", "lr": RATE, "momentum": 0.8, "weight_decay": 0.0}
    plain = ours(Optim(**given), weights, gradients)[0] - weights[0]
    ahead = ours(Optim(**given, nesterov=True), weights, gradients)[0] - weights[0]
    np.testing.assert_allclose(ahead, 1.8 * plain, rtol=1e-9)


def test_large_gradients_are_clipped_by_optim_clip_alone():
    """Both packages' LAMB would scale all gradients to norm 1; the second step shows it."""
    weights, (small,) = drawn()
    gradients = [small, [100 * g for g in small]]
    optim = Optim(name="lamb", lr=RATE, betas=(0.8, 0.9), weight_decay=DECAY)
    found = ours(optim, weights, gradients)[0]
    expected = lamb(weights[0], [step[0] for step in gradients], DECAY, True)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_without_timm_it_is_refused_with_the_cure(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ValueError, match=rf"optim.name: {name} needs timm.*: pip install timm"):
        build_optimizer(Optim(name=name, lr=0.1), [nn.Parameter(torch.zeros(2))])


def test_timms_import_leaves_the_limits_of_dynamo(monkeypatch):
    import torch._dynamo.config as dynamo

    monkeypatch.setattr(timm, "optim", largebatch.timm_optim("lamb"))  # to have it back
    for name in [n for n in sys.modules if n.startswith("timm.optim")]:
        monkeypatch.delitem(sys.modules, name)
    with dynamo.patch(recompile_limit=17):
        largebatch.timm_optim("lamb")
        assert "timm.optim.kron" in sys.modules and dynamo.recompile_limit == 17


def test_a_step_takes_an_optimiser_with_apexs_zero_grad():
    class Bare(torch.optim.SGD):
        def zero_grad(self):
            super().zero_grad()

    layer = nn.Linear(2, 1, bias=False)

    def model(now, x):
        loss = layer(x).sum()
        return loss, {"loss": loss.detach(), "rows": torch.tensor(1)}

    step = Step(model, [Bare(layer.parameters(), lr=0.5)], Meters(join("cpu")))
    before = layer.weight.detach().clone()
    for _ in range(2):
        step({"step": torch.tensor(1)}, torch.ones(1, 2))
    torch.testing.assert_close(layer.weight.data, before - 1.0)


NVIDIAS = {
    "__init__.py": "",
    "multi_tensor_apply/__init__.py": "class multi_tensor_applier:\n    available = {available}\n",
    "optimizers/__init__.py": (
        "import torch\n"
        "class FusedLAMB(torch.optim.Optimizer):\n"
        "    def __init__(self, params, max_grad_norm, use_nvlamb, **settings):\n"
        "        super().__init__(params, settings)\n"
        "        self.limit, self.use_nvlamb = max_grad_norm, use_nvlamb\n"
        "    def zero_grad(self):\n"
        "        pass\n"
    ),
}
PYPIS = {"__init__.py": "raise ImportError('UnencryptedCookieSessionFactoryConfig')\n"}


def put(apex, files, **words):
    for name, text in files.items():
        path = apex / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(**words) if words else text)


def on_cuda(optim):
    """The optimiser of a parameter on a GPU that is not there."""
    with FakeTensorMode():
        return build_optimizer(optim, [nn.Parameter(torch.empty(2, device="cuda"))])


def test_nvidias_apex_is_taken_on_cuda_alone(apex):
    put(apex, NVIDIAS, available=True)
    optim = Optim(name="lamb", lr=0.1, betas=(0.8, 0.9), weight_decay=0.02)
    made = on_cuda(optim)
    assert class_of({"student": made}) == "apex.optimizers.FusedLAMB"
    assert (made.limit, made.use_nvlamb) == (math.inf, True)
    assert made.defaults == {
        "lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.02,
        "bias_correction": True, "grad_averaging": True,
    }  # fmt: skip
    assert not on_cuda(optim.model_copy(update={"adapt": "decayed"})).use_nvlamb
    on_cpu = build_optimizer(optim, [nn.Parameter(torch.zeros(2))])
    assert class_of({"student": on_cpu}) == "timm.optim.lamb.Lamb"


def test_pypis_apex_is_another_project(apex):
    put(apex, PYPIS)
    assert largebatch.is_nvidias_apex() is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = on_cuda(Optim(name="lamb", lr=0.1))
    assert class_of({"student": made}) == "timm.optim.lamb.Lamb"
    assert "apex" not in sys.modules


@pytest.mark.parametrize(
    ("files", "words", "why"),
    [
        (NVIDIAS, {"available": False}, "built without its CUDA kernels"),
        (NVIDIAS | {"optimizers/__init__.py": ""}, {"available": True}, "cannot be imported"),
    ],
)
def test_an_apex_that_is_not_whole_is_named(files, words, why, apex):
    put(apex, files, **words)
    with pytest.warns(UserWarning, match=f"optim.name: lamb is timm's.* {why}"):
        made = on_cuda(Optim(name="lamb", lr=0.1))
    assert class_of({"student": made}) == "timm.optim.lamb.Lamb"
