"""OFD: margins, the partial distance, the teacher's BatchNorm layers and how they run."""

import copy
import math

import pytest
import torch
from torch import nn
from twenty_steps import digits, losses, made

from kdfuse.engine.methods import METHODS, Networks, Outputs
from kdfuse.engine.methods.method import stage_names
from kdfuse.engine.methods.ofd import margins, norms_before, partial_l2
from kdfuse.engine.models import create, points, shapes

OFD = METHODS["ofd"]
TARGET = torch.tensor([0, 1])


def batchnorm(weight, bias):
    norm = nn.BatchNorm2d(len(weight))
    norm.weight.data, norm.bias.data = torch.tensor(weight), torch.tensor(bias)
    return norm


def test_margins_are_the_mean_of_the_negative_values():
    weight, bias = [0.5, -1.5, 1.0, 2.0], [0.3, -0.4, 2.5, 0.0]
    found = margins(batchnorm(weight, bias))
    for margin, w, b in zip(found.tolist(), weight, bias, strict=True):
        x = torch.linspace(b - 12 * abs(w), 0, 400_001, dtype=torch.float64)
        density = torch.exp(-(((x - b) / w) ** 2) / 2)
        expected = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
        assert margin == pytest.approx(float(expected), rel=1e-5)


def test_channels_that_are_hardly_ever_negative_have_a_fixed_margin():
    edge = 3.0902323  # 0.1 % of a normal distribution are so many deviations below its mean
    found = margins(batchnorm([0.5, 0.5, 0.5], [0.5 * edge + 1e-4, 0.5 * edge - 1e-4, 40.0]))
    assert found[0] == found[2] == -1.5
    assert found[1] != -1.5 and -0.3 < found[1] < 0
    dead = margins(batchnorm([0.0, 0.0, 0.0], [-0.2, 0.0, 0.7]))  # pruned channels are constant
    torch.testing.assert_close(dead, torch.tensor([-0.2, 0.0, 0.0]))


def partial(x, y, mu):
    """The cases of the paper, one value at a time: the distance and its derivative."""
    if y > 0:
        return (x - y) ** 2, 2 * (x - y)
    if y > mu:
        return ((x - y) ** 2, 2 * (x - y)) if x > y else (0.0, 0.0)
    return ((x - mu) ** 2, 2 * (x - mu)) if x > mu else (0.0, 0.0)


def test_the_partial_distance_and_its_gradient():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    margin = torch.tensor([-0.9, -0.3, -2.0], dtype=torch.float64).view(1, 3, 1, 1)
    value = partial_l2(student, teacher, margin)
    value.backward()
    cases = [
        partial(*numbers)
        for numbers in zip(
            student.flatten().tolist(),
            teacher.flatten().tolist(),
            margin.expand_as(teacher).flatten().tolist(),
            strict=True,
        )
    ]
    assert {(d > 0) for d, _ in cases} == {True, False}
    assert float(value.detach()) == pytest.approx(sum(d for d, _ in cases) / 2)
    expected = torch.tensor([g for _, g in cases], dtype=torch.float64).view_as(student) / 2
    torch.testing.assert_close(student.grad, expected)


def outputs(dtype=torch.float32, seed=0):
    """Three levels; the student's connected maps are halved in size at the second."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(4, 8, 8), (5, 4, 4), (6, 2, 2)]
    theirs = [(4, 8, 8), (5, 8, 8), (6, 2, 2)]
    student = [torch.randn(2, *s, generator=generator).to(dtype).requires_grad_() for s in sizes]
    teacher = [torch.randn(2, *s, generator=generator).to(dtype) for s in theirs]
    margin = [-torch.rand(1, s[0], 1, 1, generator=generator) for s in sizes]
    return Outputs(
        torch.zeros(2, 4),
        student_taps={f"s{i}": s for i, s in enumerate(student)},
        teacher_taps={f"t{i}": t for i, t in enumerate(teacher)},
        head={
            **{f"connected{i}": s for i, s in enumerate(student)},
            **{f"margin{i}": m for i, m in enumerate(margin)},
        },
    )


def test_deeper_levels_count_more_and_the_teachers_map_is_pooled():
    out = outputs()
    expected = 0.0
    for i, share in enumerate([0.25, 0.5, 1.0]):
        student, teacher = out.head[f"connected{i}"].detach(), out.teacher_taps[f"t{i}"]
        if i == 1:
            teacher = teacher.view(2, 5, 4, 2, 4, 2).mean((3, 5))
        cases = zip(
            student.flatten().tolist(),
            teacher.flatten().tolist(),
            out.head[f"margin{i}"].expand_as(teacher).flatten().tolist(),
            strict=True,
        )
        expected += share * sum(partial(*numbers)[0] for numbers in cases) / 2
    assert float(OFD().features(out, TARGET)["ofd"].detach()) == pytest.approx(expected, rel=1e-5)


def test_bf16_and_compiled():
    expected = OFD().features(outputs(), TARGET)
    half = OFD().features(outputs(torch.bfloat16), TARGET)["ofd"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected["ofd"], rtol=0.02, atol=0)
    compiled = torch.compile(OFD().features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outputs(), TARGET), expected)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("torchvision:resnet18", [f"layer{i}.1.bn2" for i in (1, 2, 3, 4)]),
        (
            "torchvision:resnet50",
            ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"],
        ),
        ("resnet8", [f"layer{i}.0.bn2" for i in (1, 2, 3)]),
        ("resnet20", [f"layer{i}.2.bn2" for i in (1, 2, 3)]),
        ("wrn_40_2", ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
        ("vgg13", [f"block{i}.4" for i in (1, 2, 3, 4)]),
    ],
)
def test_batchnorms_are_those_that_the_released_code_names(name, published):
    network = create(name, 10).train()
    before = copy.deepcopy(network.state_dict())
    known = points(network)
    found = norms_before(network, [known[s] for s in stage_names(known, ".pre")], 32)
    assert found == [network.get_submodule(path) for path in published]
    assert network.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_teacher_without_batchnorm_is_refused():
    teacher = create("torchvision:alexnet", 10)
    taps = {"teacher": ["features.1"], "student": ["features.1"]}
    found = {role: shapes(teacher, names, 64) for role, names in taps.items()}
    networks = Networks(10, teacher, teacher, [], {"teacher": {}}, found, size=64)
    with pytest.raises(ValueError, match=r"the teacher has none of features\.1's channels"):
        OFD().head(networks)


def test_the_head_holds_connectors_and_margins():
    _, distiller = made("ofd", student="resnet8", teacher="resnet8x4")
    head = distiller.main.head
    expected = margins(distiller.teacher.layer3[-1].bn2)
    torch.testing.assert_close(head.margin2, expected.view(1, 256, 1, 1))
    weight = head.connectors.layers[2][0].weight
    assert weight.shape == (256, 64, 1, 1)
    assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    out = distiller.outputs(*digits())["main"]
    assert out.head["connected2"].shape == out.teacher_taps["stage3.pre"].shape


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_teachers_batchnorm_runs_as_the_option_says(mode):
    method = {"name": "ofd", "teacher_batchnorm": mode}
    _, distiller = made(method, teacher="resnet8")
    teacher = distiller.teacher
    batchnorms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert OFD(teacher_batchnorm=mode).teacher_mode == mode
    if mode == "eval":  # folded into the convolutions
        assert not teacher.training and not batchnorms
        return
    assert teacher.training and len(batchnorms) == 9
    reference = copy.deepcopy(teacher)
    out = distiller.outputs(*digits())["main"]
    images = distiller.inputs["teacher"](digits()[0])
    torch.testing.assert_close(out.teacher, reference.train()(images), rtol=1e-4, atol=1e-4)
    assert (out.teacher - reference.eval()(images)).abs().max() > 0.01
    assert not distiller.eval().teacher.training


def test_twenty_steps_lower_it():
    _, distiller = made("ofd")
    found = losses(distiller, "ofd")
    assert found[-1] < 0.8 * found[0]  # measured: 0.67 at most
