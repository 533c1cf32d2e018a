"""SimKD: projectors, the reused classifier, the study's variants, and what is kept of a run."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from steps import loss_of, step_with
from tiny import tiny
from torch import nn

from kdfuse.engine.methods import METHODS, Outputs
from kdfuse.engine.methods.parts.reused import Projector
from kdfuse.engine.training.build import build
from kdfuse.engine.training.classification import begin
from kdfuse.engine.training.evaluate import evaluate
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.start import train

SimKD = METHODS["simkd"]
N, C = 4, 10


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.arange(N), torch.arange(N)


def made(student="resnet14", teacher="resnet20", **options):
    recipe = tiny(
        None,
        {"name": "simkd", **options},
        data={"source": "synthetic", "classes": C, "subset": None},
        student={"name": student},
        teacher={"name": teacher},
    )
    torch.manual_seed(0)
    distiller = build(recipe, C, torch.device("cpu"), torch.arange(N))
    distiller.prepare(())
    return recipe, distiller


@pytest.mark.parametrize(
    ("channels", "factor", "published"),
    [
        ((256, 256), 2, 214_016),
        ((256, 256), 4, 70_400),
        ((256, 256), 8, 26_240),
        ((320, 256), 2, 222_208),
    ],
)
def test_projectors_have_the_published_sizes(channels, factor, published):
    projector = Projector(*channels, factor, "none", (8, 8), (8, 8))
    assert sum(p.numel() for p in projector.parameters()) == published


def test_bias_is_added_or_stands_in_for_batchnorm():
    added = Projector(8, 8, 2, "added", (4, 4), (4, 4))
    instead = Projector(8, 8, 2, "instead", (4, 4), (4, 4))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in added.layers) == 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in instead.layers)
    for projector in (added, instead):
        assert all(m.bias is not None for m in projector.layers if isinstance(m, nn.Conv2d))


def test_a_larger_student_map_is_pooled_and_a_smaller_one_pools_the_teacher():
    _, distiller = made("resnet14", "torchvision:resnet18")  # 4 x 4 against 1 x 1
    out = distiller.outputs(*batch())["main"]
    assert out.head["projected0"].shape == out.head["wanted0"].shape == (N, 512, 1, 1)
    _, distiller = made("torchvision:resnet18", "resnet20")
    out = distiller.outputs(*batch())["main"]
    assert out.head["projected0"].shape == out.head["wanted0"].shape == (N, 64, 1, 1)


def test_the_loss_is_the_mean_squared_difference_alone():
    recipe, distiller = made()
    out = distiller.outputs(*batch())["main"]
    loss, terms = loss_of(distiller.main, out, batch()[1])
    expected = F.mse_loss(out.head["projected0"].double(), out.head["wanted0"].double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    logits = out.head["logits"]
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, batch()[1]))
    assert int(terms["top1"]) == int((logits.argmax(1) == batch()[1]).sum())


def test_kl_is_of_channel_softmaxes_teacher_first():
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(N, 3, 2, 2, generator=generator, dtype=torch.float64)
    teacher = torch.randn(N, 3, 2, 2, generator=generator, dtype=torch.float64)
    out = Outputs(
        student=torch.zeros(N, C),
        teacher=torch.zeros(N, C),
        head={"projected0": student, "wanted0": teacher},
    )
    for over, dims in (("channels", 1), ("positions", (2, 3))):
        method = SimKD(distance="kl", kl_over=over, kl_temperature=2.0)
        p = (teacher / 2).exp() / (teacher / 2).exp().sum(dims, keepdim=True)
        q = (student / 2).exp() / (student / 2).exp().sum(dims, keepdim=True)
        expected = (p * (p / q).log()).sum(dims).mean()
        found = method.features(out, torch.zeros(N, dtype=torch.int64))["feature"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kept_mean", [True, False])
def test_only_images_that_the_teacher_gets_right(kept_mean):
    target = torch.tensor([3, 3, 1, 0])
    teacher = F.one_hot(torch.tensor([3, 2, 1, 5]), C).float()  # right for the first and the third
    student, wanted = torch.randn(N, 3, 2, 2, requires_grad=True), torch.randn(N, 3, 2, 2)
    out = Outputs(torch.zeros(N, C), teacher, head={"projected0": student, "wanted0": wanted})
    options = {} if kept_mean else {"kept_mean": False}
    found = SimKD(only_right=True, **options).features(out, target)["feature"]
    rows = (student - wanted).square().mean((1, 2, 3))
    torch.testing.assert_close(found, (rows[0] + rows[2]) / (2 if kept_mean else N))
    found.backward()
    assert not student.grad[[1, 3]].any() and student.grad[[0, 2]].any()
    nobody = Outputs(torch.zeros(N, C), torch.eye(N, C), head=out.head)
    none_right = SimKD(only_right=True).features(nobody, target.new_full((N,), 9))["feature"]
    assert none_right.item() == 0


@pytest.mark.parametrize(
    ("projectors", "pairs"),
    [
        ("last", [("stage3", "pool:in")]),
        ("two", [("stage2", "stage2"), ("stage3", "pool:in")]),
        ("all", [("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "pool:in")]),
    ],
)
def test_which_layers_are_projected(projectors, pairs):
    recipe, distiller = made(projectors=projectors)
    head = distiller.main.head
    assert head.pairs == pairs and len(head.projectors) == len(pairs)
    distiller.train()
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
    terms = step_with(optimizer, distiller)(*batch())
    named = {name: value for name, value in terms.items() if name.startswith("feature")}
    assert len(named) == len(pairs)
    torch.testing.assert_close(terms["loss"], sum(named.values()))
    assert all(p.grad is not None for p in head.projectors.parameters())


def test_stages_are_paired_by_depth():
    four = {f"stage{i}": "" for i in (1, 2, 3, 4)}
    three = {f"stage{i}": "" for i in (1, 2, 3)} | {"pooled": "pool", "classifier": "fc"}
    points = {"student": four, "teacher": three}
    # MobileNetV2's blocks[4] (stage 3 of 4) and layer2 of ResNet32x4, as the study's text suggests
    assert SimKD(projectors="two").pairs(points)[0] == ("stage3", "stage3")
    assert [t for _, t in SimKD(projectors="all").pairs(points)] == [
        "stage1",
        "stage2",
        "stage3",
        "pool:in",
    ]


def test_the_students_own_classifier_and_the_reused_one_are_not_trained():
    _, distiller = made()
    student, head = distiller.main.student, distiller.main.head
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {"fc.weight", "fc.bias"}
    assert not any(p.requires_grad for p in head.classifier.parameters())
    out = distiller.outputs(*batch())["main"]
    loss_of(distiller.main, out, batch()[1])[0].backward()
    assert all(p.grad is not None for p in distiller.parameters() if p.requires_grad)


def test_what_is_evaluated_is_projector_and_reused_classifier():
    _, distiller = made()
    distiller.eval()
    images = batch()[0]
    network, inputs = distiller.evaluated()["student"]
    found = distiller.predict(network, inputs, images)
    out = distiller.outputs(*batch())["main"]
    torch.testing.assert_close(found, out.head["logits"])
    assert (found - out.student).abs().max() > 1e-3


def test_twenty_steps_lower_the_loss():
    _, distiller = made()
    distiller.train()
    optimizer = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=0.05)
    step = step_with(optimizer, distiller)
    losses = [float(step(*batch())["loss"]) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]  # measured: 0.42 to 0.71


def test_a_run_keeps_the_projector_and_evaluates_with_it(tmp_path):
    recipe = tiny(
        tmp_path / "digits",
        "simkd",
        student={"name": "resnet8"},
        optim={"lr": 0.02, "schedule": "constant", "ema": 0.9},
    )
    run = train(recipe, tmp_path / "run")
    again = evaluate(run)
    state = torch.load(run / "checkpoints" / "best" / "state.pt", weights_only=True)
    assert any(key.startswith("projectors") for key in state["head"])
    assert any(key.startswith("classifier") for key in state["head"])
    assert {"top1", "ema_top1"} <= set(again["last"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_over": "positions"}, "no effect with distance l2"),
        ({"kept_mean": False}, "no effect with only_right false"),
        ({"extra_weight": 2.0}, "no effect with projectors last"),
        ({"student_taps": ["stage1"]}, "together with method.teacher_taps"),
        ({"student_taps": ["a", "b"], "teacher_taps": ["a"]}, "2 points for 1"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        SimKD(**options)


def test_other_teachers_and_odd_factors_are_refused():
    with pytest.raises(ValueError, match="does not say where it pools and classifies"):
        made(teacher="torchvision:alexnet")
    with pytest.raises(ValueError, match="method.factor: 3 does not divide the teacher's 64"):
        made(factor=3)


def test_the_state_of_a_compiled_run_is_the_same():
    keys = {}
    for compile in (False, True):
        recipe = tiny(
            None,
            "simkd",
            data={"source": "synthetic", "classes": C, "subset": None},
            run={"compile": compile},
        )
        distiller, _ = begin(recipe, join("cpu"), C, torch.arange(N), {})
        keys[compile] = list(distiller.state_dict())
    assert keys[True] == keys[False]
