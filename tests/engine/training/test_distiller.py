"""Distiller: the teacher stays out of it, inputs are each network's own, many processes agree."""

import copy

import pytest
import torch
from steps import loss_of, step_with
from tiny import tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdfuse.engine.models import create
from kdfuse.engine.recipe.schema import Normalize
from kdfuse.engine.training.build import build
from kdfuse.engine.training.meters import Clock, Diverged, Meters
from kdfuse.engine.training.networks import Distiller
from kdfuse.engine.training.ranks import choose_device, join

CLASSES = 10
CPU = torch.device("cpu")


def make(method, *, prepare=True, **changes):
    recipe = tiny(
        None, method, data={"source": "synthetic", "classes": CLASSES, "subset": None}, **changes
    )
    torch.manual_seed(0)
    made = build(recipe, CLASSES, CPU, torch.arange(100) % CLASSES)
    if prepare:
        made.prepare(recipe.run.compiled)
    return recipe, made


def batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.arange(n) % CLASSES, torch.arange(n)


def sgd(distiller):
    return torch.optim.SGD(distiller.parameters(), lr=0.1)


def test_nothing_reaches_the_teacher():
    recipe, distiller = make({"name": "slkd", "slts": 2})
    teacher = distiller.teacher
    before = copy.deepcopy(teacher.state_dict())
    inside = set(map(id, distiller.modules()))
    assert not any(id(module) in inside for module in teacher.modules())
    assert not any(key.startswith("teacher") for key in distiller.state_dict())
    assert len(list(distiller.parameters())) == 3 * len(list(distiller.main.student.parameters()))
    distiller.train()
    step_with(sgd(distiller), distiller)(*batch())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_step_trains_everything_else():
    recipe, distiller = make({"name": "slkd", "slts": 2})
    before = copy.deepcopy(distiller.state_dict())
    distiller.train()
    step_with(sgd(distiller), distiller)(*batch())
    same = [k for k, v in distiller.state_dict().items() if torch.equal(v, before[k])]
    assert not same


def test_the_folded_teacher_and_every_input_are_what_each_network_expects():
    own = Normalize(mean=(0.2, 0.3, 0.4), std=(0.1, 0.5, 0.9))
    recipe, distiller = make("kd", teacher={"name": "resnet8", "normalize": own})
    torch.manual_seed(0)  # as the distiller's: first the student, then the teacher
    student, teacher = create("resnet8", CLASSES).eval(), create("resnet8", CLASSES).eval()
    images, target, index = batch()
    distiller.eval()
    out = distiller.outputs(images, target, index)["main"]

    def reference(network, normalize):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (normalize.mean, normalize.std))
        return network((images / 255 - mean) / std)

    torch.testing.assert_close(
        out.student, reference(student, recipe.data.normalize), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(out.teacher, reference(teacher, own), rtol=1e-4, atol=1e-4)
    wrong = reference(teacher, recipe.data.normalize)
    assert (out.teacher - wrong).abs().max() > 0.01


def test_equal_normalisation_is_computed_once():
    _, distiller = make("slkd")
    assert len({id(inputs) for inputs in distiller.inputs.values()}) == 1


def test_channels_last_reaches_weights_and_inputs():
    for wanted in (True, False):
        _, distiller = make("kd", run={"channels_last": wanted})
        weight = distiller.main.student.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is wanted
        images = distiller.inputs["student"](batch()[0])
        assert images.is_contiguous(memory_format=torch.channels_last) is wanted


def test_uskd_head_is_trained_through_the_tap_and_is_no_part_of_the_student():
    recipe, distiller = make("uskd")
    student, head = distiller.main.student, distiller.main.head
    assert set(head.state_dict()) == {"classifier.weight", "classifier.bias"}
    out = distiller.outputs(*batch())["main"]
    assert out.student_taps["stage2"].shape == (8, 32, 8, 8)
    out.head["weak"].sum().backward()
    assert head.classifier.weight.grad.abs().max() > 0
    assert student.conv1.weight.grad.abs().max() > 0
    assert student.layer3[0].conv1.weight.grad is None


def test_bf16_logits_and_float32_weights():
    recipe, distiller = make("slkd", run={"amp": "bf16"})
    out = distiller.outputs(*batch())["main"]
    assert {z.dtype for z in (out.student, out.teacher, *out.slts)} == {torch.bfloat16}
    loss, _ = loss_of(recipe.method, out, batch()[1])
    assert loss.dtype == torch.float32
    loss.backward()
    assert {p.grad.dtype for p in distiller.parameters()} == {torch.float32}
    assert distiller.predict(distiller.main.student, "student", batch()[0]).dtype == torch.bfloat16


class Casts(TorchDispatchMode):
    """Counts the casts to bfloat16."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        cast = func is torch.ops.aten._to_copy.default
        self.count += cast and kwargs.get("dtype") == torch.bfloat16
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "torchvision:resnet18"])
def test_a_frozen_teacher_casts_nothing_a_step_and_answers_the_same(name):
    """Autocast keeps the casts of trained weights alone: a teacher's were made in each step."""
    answers, casts = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        _, distiller = make("kd", run={"amp": "bf16"}, teacher={"name": name})
        if dtype == torch.float32:
            distiller.teacher.float()
        images = batch()[0]
        with Casts() as seen:
            answers[dtype] = distiller.predict(distiller.teacher, "teacher", images)
        casts[dtype] = seen.count
    assert torch.equal(*answers.values())
    assert casts[torch.bfloat16] <= 2 < casts[torch.float32]  # of the images alone


def test_what_a_head_takes_from_the_teacher_stays_float32():
    _, distiller = make("simkd", run={"amp": "bf16"})
    layers = [x for x in distiller.teacher.modules() if isinstance(x, nn.Conv2d | nn.Linear)]
    assert {x.weight.dtype for x in layers} == {torch.bfloat16}
    assert {p.dtype for p in distiller.parameters()} == {torch.float32}
    assert {b.dtype for b in distiller.buffers() if b.is_floating_point()} == {torch.float32}
    _, distiller = make("simkd")
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.float32}


def test_compiled_in_place_keeps_keys_and_losses():
    losses, keys = {}, {}
    for compiled in (False, True):
        recipe, distiller = make("uskd", run={"compile": compiled})
        step = step_with(sgd(distiller), distiller.train())
        losses[compiled] = [float(step(*batch())["loss"]) for _ in range(3)]
        keys[compiled] = list(distiller.state_dict())
    assert keys[True] == keys[False]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[False][2] < losses[False][0]


def test_meters_are_means_and_shares_and_name_the_first_bad_step():
    group = join("cpu")
    meters = Meters(group)
    for step, (loss, hits) in enumerate([(1.0, 2), (4.0, 3)], 1):
        value = torch.tensor(loss)
        counts = {"top1": torch.tensor(hits), "rows": torch.tensor(4)}
        meters.add(torch.tensor(step), {"loss": value, "kd": 2 * value, **counts})
    assert meters.read() == {"loss": 2.5, "kd": 5.0, "top1": 62.5}
    assert meters.read_epoch() == {"loss": 2.5, "kd": 5.0, "top1": 62.5}
    for step, loss in enumerate([1.0, torch.inf, torch.nan, 1.0], 3):
        value = torch.tensor(loss)
        terms = {"loss": value, "kd": value, "top1": value, "rows": value}
        meters.add(torch.tensor(step), terms)
    with pytest.raises(Diverged, match="loss of step 4 is not finite"):
        meters.read()


class Branching(torch.nn.Module):
    """A network that torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, CLASSES)

    def forward(self, x):
        pooled = x.mean((2, 3))
        return self.layer(pooled if pooled.sum() > 0 else -pooled)


def test_a_teacher_that_cannot_be_folded_is_used_as_it_is():
    recipe, distiller = make("kd")
    teacher = Branching()
    with pytest.warns(UserWarning, match="BatchNorm layers unfolded: .*Branching"):
        made = Distiller(distiller.learners, [teacher], dict(distiller.inputs.items()), amp=False)
    images = batch()[0]
    expected = teacher(made.inputs["teacher"](images))
    assert torch.equal(made.outputs(*batch())["main"].teacher, expected)


def test_the_clock_counts_steps_and_waits():
    clock = Clock()
    assert list(clock.count(iter("abc"))) == ["a", "b", "c"]
    speed, share = clock.read()
    assert speed > 0 and 0 <= share <= 1
    assert clock.read()[0] == 0


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="run.device = 'cuda'"):
        choose_device("cuda")
    assert choose_device("auto") == CPU
