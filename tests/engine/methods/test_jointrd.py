"""JointRD: the paths through the teacher, their weight over the epochs, and the forms by name."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from steps import loss_of, step_with
from tiny import tiny

from kdfuse.engine.methods import METHODS
from kdfuse.engine.models import plain
from kdfuse.engine.training.build import build

pytestmark = pytest.mark.slow(15)

N, C = 4, 10
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def narrow_networks():
    """With an eighth of their channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_WIDTHS", (8, 16, 32, 64))
        yield


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.arange(N), torch.arange(N)


def made(name="jointrd", **options):
    guide = "slt" if name == "jointrd_joint" else "teacher"
    recipe = tiny(
        None,
        {"name": name, **options},
        data={"source": "synthetic", "classes": C, "subset": None},
        student={"name": "plain18_dirac"},
        **{guide: {"name": "jointrd_resnet18"}},
    )
    torch.manual_seed(0)
    distiller = build(recipe, C, CPU, torch.arange(N))
    for network in (distiller.main.student, *distiller.main.slts):
        for norm in network.modules():  # running statistics that show which were used
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_mean.uniform_(-0.1, 0.1)
                norm.running_var.uniform_(0.5, 1.5)
    distiller.prepare(())
    return distiller


def manual(network, distiller):
    """Pre-ReLU stage outputs and logits of a network in its present mode, by its own layers."""
    x = distiller.inputs["student"](batch()[0])
    x = network.maxpool(network.bn1(network.conv1(x)))
    features = []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = layer(x)
        features.append(x)
    return features, network.fc(x.relu().mean((2, 3)))


def guide_of(distiller):
    return distiller.main.head._guide[0]


@pytest.mark.parametrize("epoch", [0.0, 30.7, 60.0, 199.0])
def test_the_full_loss_is_the_mean_of_four_paths(epoch):
    distiller = made(decay_to=0.25)
    distiller.train()
    out = distiller.outputs(*batch())["main"]
    target = batch()[1]
    loss, terms = loss_of(distiller.main, out, target, epoch)
    whole = math.floor(epoch)
    m = 0.25 + 0.75 * (1 + math.cos(math.pi * min(whole, 60) / 60)) / 2
    features, logits = manual(distiller.main.student, distiller)
    guide, paths = guide_of(distiller), []
    for layers, feature in (
        ((guide.layer2, guide.layer3, guide.layer4), features[0]),
        ((guide.layer3, guide.layer4), features[1]),
        ((guide.layer4,), features[2]),
    ):
        for layer in layers:
            feature = layer(feature)
        paths.append(F.cross_entropy(guide.fc(feature.relu().mean((2, 3))), target))
    expected = (F.cross_entropy(logits, target) + m * sum(paths)) / 4
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert [float(terms[f"path{i}"]) for i in (1, 2, 3)] == pytest.approx(
        [path.item() for path in paths], rel=1e-4
    )


def test_the_paths_train_the_early_stages_and_never_the_teacher():
    distiller = made()
    out = distiller.outputs(*batch())["main"]
    guide, student = guide_of(distiller), distiller.main.student
    before = {key: value.clone() for key, value in guide.state_dict().items()}
    out.head["logits1"].sum().backward()
    assert student.layer1[0].conv1.weight.grad.abs().sum() > 0
    assert student.layer2[0].conv1.weight.grad is None
    assert not any(p.grad is not None or p.requires_grad for p in guide.parameters())
    assert all(torch.equal(before[key], value) for key, value in guide.state_dict().items())


def partial_l2(source, wanted, margin):
    """Three cases, element by element, as the released code states them."""
    total = 0.0
    for x, y, mu in zip(source.flatten(), wanted.flatten(), margin.flatten(), strict=True):
        if x > mu and y <= mu:
            total += (x - mu) ** 2
        elif (x > y and mu < y <= 0) or y > 0:
            total += (x - y) ** 2
    return total / N


@pytest.mark.parametrize("name", ["jointrd", "jointrd_ta_released", "jointrd_joint"])
def test_features_are_margin_distances_to_the_teachers_last(name):
    distiller = made(name, feature_weight=0.01)
    distiller.train()
    out = distiller.outputs(*batch())["main"]
    target = batch()[1]
    loss, terms = loss_of(distiller.main, out, target, 100.0)
    taps = out.slt_taps[0] if name == "jointrd_joint" else out.teacher_taps
    wanted = taps["stage4.pre"].detach()
    margin = out.head["margin"].expand_as(wanted)
    distances = {
        key: partial_l2(value.detach(), wanted, margin)
        for key, value in out.head.items()
        if key.startswith("feature")
    }
    for key, value in distances.items():
        assert float(terms[key]) == pytest.approx(float(value), rel=1e-4)
    ce = F.cross_entropy(out.student, target)
    if name == "jointrd_ta_released":
        expected = ce + 0.01 * distances["feature4"]
        assert set(distances) == {"feature4"} and not any("path" in key for key in terms)
    else:
        paths = [F.cross_entropy(out.head[f"logits{i}"], target) for i in (1, 2, 3)]
        early = sum(distances[f"feature{i}"] for i in (1, 2, 3))
        expected = (ce + 0.5 * sum(paths) + 0.01 * (distances["feature4"] + 0.5 * early)) / 4
        if name == "jointrd_joint":
            expected = expected + F.cross_entropy(out.slts[0], target)
    torch.testing.assert_close(loss, torch.as_tensor(expected), rtol=1e-4, atol=1e-5)


def test_the_co_trained_teacher_learns_from_its_own_labels_alone():
    distiller = made("jointrd_joint")
    distiller.train()
    out = distiller.outputs(*batch())["main"]
    guide, student = distiller.main.slts[0], distiller.main.student
    assert guide.training and all(p.requires_grad for p in guide.parameters())
    loss, terms = loss_of(distiller.main, out, batch()[1])
    own = torch.autograd.grad(
        F.cross_entropy(out.slts[0], batch()[1]), list(guide.parameters()), retain_graph=True
    )
    loss.backward()
    for parameter, expected in zip(guide.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is not None for p in student.parameters())
    assert {"slt0_ce", "slt0_top1", "path1"} <= set(terms)


def test_its_paths_use_the_running_statistics():
    """In training, other images of the batch do not change a path of one image behind the tap."""
    distiller = made("jointrd_joint")
    distiller.train()
    head, guide = distiller.main.head, distiller.main.slts[0]
    feature = torch.randn(N, 8, 16, 16)
    out = distiller.outputs(*batch())["main"]
    taps = {**out.student_taps, "stage1.pre": feature}
    out.student_taps = taps
    together = head(out, batch()[1], batch()[2])["logits1"]
    out.student_taps = {**taps, "stage1.pre": torch.cat([feature[:1], 3 * feature[1:]])}
    torch.testing.assert_close(head(out, batch()[1], batch()[2])["logits1"][0], together[0])
    assert guide.training and all(module.training for module in guide.modules())


def test_paths_may_learn_from_the_teachers_logits():
    distiller = made(paths="kd", kd_weight=0.7, temperature=2.0, decay_epochs=0)
    out = distiller.outputs(*batch())["main"]
    loss, terms = loss_of(distiller.main, out, batch()[1])
    p = F.softmax(out.teacher / 2, 1)
    for i in (1, 2, 3):
        z = out.head[f"logits{i}"]
        kl = 4 * (p * (p.log() - F.log_softmax(z / 2, 1))).sum(1).mean()
        expected = 0.3 * F.cross_entropy(z, batch()[1]) + 0.7 * kl
        torch.testing.assert_close(terms[f"path{i}"], expected, rtol=1e-4, atol=1e-5)


def test_compiled_paths_are_the_same():
    losses = {}
    for compiled in (False, True):
        distiller = made("jointrd_joint", feature_weight=1e-3)
        if compiled:
            distiller.main.head.compile(backend="aot_eager")
        distiller.train()
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        step = step_with(optimizer, distiller)
        losses[compiled] = [step(*batch())["loss"].item() for _ in range(2)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"name": "resnet8"}}, "the student has no stage4.pre"),
        (
            {"teacher": {"name": "torchvision:resnet18"}},
            "a ResNet cannot go on from a stage; take",
        ),
    ],
)
def test_other_networks_are_refused(changes, message):
    networks = {"student": {"name": "plain18"}, "teacher": {"name": "jointrd_resnet18"}}
    recipe = tiny(
        None,
        {"name": "jointrd", "feature_weight": 1e-3},
        data={"source": "synthetic", "classes": C, "subset": None},
        **{**networks, **changes},
    )
    with pytest.raises(ValueError, match=message):
        build(recipe, C, CPU, torch.arange(N))


def test_options_without_effect_are_refused():
    with pytest.raises(ValidationError, match="no effect with paths ce"):
        METHODS["jointrd"](temperature=2.0)
    with pytest.raises(ValidationError, match="decay_to"):
        METHODS["jointrd_ta_released"](decay_to=0.1)
