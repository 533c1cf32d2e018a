"""MSE: squared differences of all stages, as sums or means, with weights and connectors."""

import pytest
import torch
from pydantic import ValidationError
from steps import loss_of
from twenty_steps import losses, made

from kdfuse.engine.methods import METHODS, Networks, Outputs
from kdfuse.engine.models import create, points

MSE = METHODS["mse"]
SHAPES = [(3, 4, 6, 6), (3, 5, 3, 3), (3, 7)]
TARGET = torch.tensor([0, 1, 2])


def features(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {f"tap{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def outputs(dtype=torch.float32):
    student = {k: v.to(dtype).requires_grad_() for k, v in features(0).items()}
    teacher = {k: v.to(dtype).requires_grad_() for k, v in features(1).items()}
    return Outputs(torch.zeros(3, 4), student_taps=student, teacher_taps=teacher)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.25]])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_value_and_gradient(reduction, weights):
    method, out = MSE(reduction=reduction, stage_weights=weights), outputs()
    (value,) = method.features(out, TARGET).values()
    expected, gradients = 0.0, []
    for weight, s, t in zip(
        weights or [1, 1, 1], out.student_taps.values(), out.teacher_taps.values(), strict=True
    ):
        difference = s.detach().double() - t.detach().double()
        over = len(difference) if reduction == "sum" else difference.numel()
        expected += weight * float((difference**2).sum()) / over
        gradients.append(weight * 2 * difference / over)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    value.backward()
    for s, gradient in zip(out.student_taps.values(), gradients, strict=True):
        torch.testing.assert_close(s.grad.double(), gradient, rtol=1e-5, atol=1e-6)
    assert all(t.grad is None for t in out.teacher_taps.values())


def test_it_is_weighed_with_the_cross_entropy():
    out = outputs()
    out.teacher = torch.randn(3, 4)
    out.features = MSE().features(out, TARGET)
    loss, terms = loss_of(MSE(), out, TARGET)
    torch.testing.assert_close(loss, terms["ce"] + 1e-3 * terms["mse"])


def test_equal_features_give_nothing():
    out = outputs()
    out.teacher_taps = out.student_taps
    assert MSE().features(out, TARGET)["mse"] == 0


def test_bf16_features_give_a_float32_value():
    value = MSE().features(outputs(torch.bfloat16), TARGET)["mse"]
    assert value.dtype == torch.float32
    expected = MSE().features(outputs(), TARGET)["mse"]
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0)


def test_compiled_it_is_the_same():
    method = MSE(stage_weights=(1.0, 0.5, 0.25))
    compiled = torch.compile(method.features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outputs(), TARGET), method.features(outputs(), TARGET))


def test_the_stages_are_read_before_or_after_their_relu():
    known = {"student": points(create("resnet8", 10)), "teacher": points(create("vgg13", 10))}
    known["teacher"] = {k: v for k, v in known["teacher"].items() if k[:6] <= "stage3"}
    before = ("stage1.pre", "stage2.pre", "stage3.pre")
    assert MSE().reads(known) == {"student": before, "teacher": before}
    after = MSE(relu="after").reads(known)
    assert after["student"] == after["teacher"] == ("stage1", "stage2", "stage3")


def networks(student, teacher):
    shapes = {"student": {"s": torch.Size(student)}, "teacher": {"t": torch.Size(teacher)}}
    return Networks(4, torch.nn.Identity(), shapes=shapes)


def test_a_connector_leads_to_the_teachers_channels():
    method = MSE(connector=True)
    head = method.head(networks((1, 4, 6, 6), (1, 9, 6, 6)))
    student, teacher = torch.randn(3, 4, 6, 6), torch.randn(3, 9, 6, 6)
    out = Outputs(torch.zeros(3, 4), student_taps={"s": student}, teacher_taps={"t": teacher})
    out.head = head(out, TARGET, TARGET)
    made = torch.einsum("nchw,oc->nohw", student, head.layers[0][0].weight[:, :, 0, 0])
    made = (made - made.mean((0, 2, 3), keepdim=True)) / (
        made.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()
    expected = (made - teacher).square().sum() / 3
    torch.testing.assert_close(method.features(out, TARGET)["mse"], expected, rtol=1e-4, atol=1e-4)
    assert MSE().head(networks((1, 4, 6, 6), (1, 4, 6, 6))) is None


@pytest.mark.parametrize(
    ("options", "student", "teacher", "message"),
    [
        ({}, (1, 4, 6, 6), (1, 9, 6, 6), "set method.connector=true"),
        ({}, (1, 4, 6, 6), (1, 4, 3, 3), r"s gives \(1, 4, 6, 6\), the teacher's t \(1, 4, 3, 3\)"),
        ({"connector": True}, (1, 4, 6, 6), (1, 4, 3, 3), "name other points"),
        ({"connector": True}, (1, 4), (1, 9), "the student's s gives"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(options, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        MSE(**options).head(networks(student, teacher))


def test_options_that_do_not_fit_are_refused():
    known = {"student": {"stage1.pre": "a"}, "teacher": {"stage1.pre": "b"}}
    with pytest.raises(ValueError, match="2 weights for 1 pairs of taps"):
        MSE(stage_weights=[1.0, 1.0]).reads(known)
    with pytest.raises(ValidationError, match="no effect with student_taps and teacher_taps"):
        MSE(student_taps=["a"], teacher_taps=["b"], relu="after")
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        MSE(stage_weights=[-1.0])


@pytest.mark.parametrize("connector", [False, True])
def test_twenty_steps_lower_it(connector):
    _, distiller = made({"name": "mse", "connector": connector})
    found = losses(distiller, "mse")
    assert found[-1] < 0.8 * found[0]  # measured: 0.42 at most
