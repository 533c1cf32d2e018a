"""Methods with several teachers: SLKD and its sequential form, DGKD, DML."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from steps import loss_of

from kdfuse.engine.methods import METHODS, Outputs
from kdfuse.engine.methods.parts.self_learning import SelfLearning

N, C = 6, 7


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(N, C, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def out():
    return Outputs(
        student=logits(0),
        teacher=logits(1).detach(),
        slts=[logits(2), logits(3)],
        assistants=[logits(4).detach(), logits(5).detach()],
    )


@pytest.fixture
def target():
    return torch.tensor([0, 3, 6, 2, 2, 5])


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


def same(loss, expected, wrt):
    """Equal values, and equal gradients for all of `wrt`."""
    close(loss, expected)
    found = torch.autograd.grad(loss, wrt, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad(expected, wrt, retain_graph=True, allow_unused=True)
    for actual, gradient in zip(found, wanted, strict=True):
        blank = torch.zeros(N, C)
        close(blank if actual is None else actual, blank if gradient is None else gradient)


def kl(teacher, student, temperature):
    p, q = F.softmax(teacher / temperature, 1), F.softmax(student / temperature, 1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize("name", ["slkd", "slkd_sequential", "dgkd", "dml"])
def test_terms_and_types_for_bf16_logits(name, out, target):
    half = Outputs(
        student=out.student.detach().bfloat16().requires_grad_(),
        teacher=out.teacher.bfloat16(),
        slts=[z.detach().bfloat16() for z in out.slts],
        assistants=[z.bfloat16() for z in out.assistants],
    )
    loss, terms = loss_of(METHODS[name](), half, target)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert all(value.shape == () and not value.requires_grad for value in terms.values())
    student = half.student.float()
    rank = (student > student.gather(1, target[:, None])).sum(1)
    hits = (int(terms["rows"]), int(terms["top1"]), int(terms["top5"]))
    assert hits == (N, int((rank < 1).sum()), int((rank < 5).sum()))
    close(terms["ce"], F.cross_entropy(student, target))


SLKD = {"temperature": 3.0, "ce_weight": 0.2, "kd_weight": 0.8}
FUSED = {"fused_ce_weight": 0.5, "fused_kd_weight": 0.6, "fusion": [0.25, 0.75]}


def slts_own(out, target):
    """What the SL-Ts learn from the teacher."""
    return sum(0.2 * F.cross_entropy(z, target) + 0.8 * kl(out.teacher, z, 3.0) for z in out.slts)


def from_teacher(out, target):
    return 0.2 * F.cross_entropy(out.student, target) + 0.8 * kl(out.teacher, out.student, 3.0)


def from_slts(out, target, slts, detach=True):
    fused = 0.25 * slts[0] + 0.75 * slts[1]
    fused = fused.detach() if detach else fused
    return 0.5 * F.cross_entropy(out.student, target) + 0.6 * kl(fused, out.student, 3.0)


@pytest.mark.parametrize("detach", [True, False])
def test_slkd_from_the_slts_alone(out, target, detach):
    method = METHODS["slkd"](teachers="slts", detach_slts=detach, **SLKD, **FUSED)
    loss, terms = loss_of(method, out, target)
    expected = from_slts(out, target, out.slts, detach) + slts_own(out, target)
    same(loss, expected, [out.student, *out.slts])
    both = loss_of(METHODS["slkd"](**SLKD, **FUSED), out, target)[1]
    assert terms.keys() == both.keys()
    for name, value in both.items():
        close(terms[name], value)


def test_slkd_from_the_teacher_alone_is_kd_beside_the_slts(out, target):
    loss, _ = loss_of(METHODS["slkd"](teachers="teacher", **SLKD), out, target)
    same(loss, from_teacher(out, target) + slts_own(out, target), [out.student, *out.slts])
    none = METHODS["slkd"](fused_ce_weight=0.0, fused_kd_weight=0.0, **SLKD)
    same(loss, loss_of(none, out, target)[0], [out.student, *out.slts])
    kd, _ = loss_of(METHODS["kd"](**SLKD), out, target)
    same(loss - slts_own(out, target).float(), kd, [out.student])


def test_slkd_refuses_options_that_its_teachers_leave_unread():
    with pytest.raises(ValidationError, match="method.fused_kd_weight: 0.5 has no effect"):
        METHODS["slkd"](teachers="teacher", fused_kd_weight=0.5)


def test_sequential_slkd_is_parallel_slkd_with_frozen_slts(out, target):
    method = METHODS["slkd_sequential"](**SLKD, **FUSED)
    loss, terms = loss_of(method, out, target)
    expected = from_teacher(out, target) + from_slts(out, target, out.assistants)
    same(loss, expected, [out.student])
    beside = Outputs(student=out.student, teacher=out.teacher, slts=out.assistants)
    parallel, found = loss_of(METHODS["slkd"](**SLKD, **FUSED), beside, target)
    same(loss, parallel - slts_own(beside, target).float(), [out.student])
    for name in ("kd", "fused_kd", "ce", "top1", "top5", "rows"):
        close(terms[name], found[name])


def test_the_two_forms_of_slkd_share_their_options():
    assert {METHODS["slkd"].__base__, METHODS["slkd_sequential"].__base__} == {SelfLearning}
    shared = set(SelfLearning.model_fields) - {"name"}
    for name in shared:
        fields = [METHODS[m].model_fields[name] for m in ("slkd", "slkd_sequential")]
        assert fields[0].default == fields[1].default


@pytest.mark.parametrize("name", ["slkd", "slkd_sequential"])
@pytest.mark.parametrize(
    ("fusion", "message"), [([0.5, 0.6], "must sum to 1"), ([1.5, -0.5], "not be negative")]
)
def test_fusions_that_are_no_mean_are_refused(name, fusion, message):
    with pytest.raises(ValidationError, match=message):
        METHODS[name](fusion=fusion)


def test_sequential_slkd_refuses_a_fusion_of_other_slts(out, target):
    method = METHODS["slkd_sequential"](fusion=[0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match="method.fusion: 3 weights for 2 assistants"):
        loss_of(method, out, target)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_dgkd_with_all_guides(out, target, reduction):
    method = METHODS["dgkd"](temperature=3.0, kd_weight=0.7, drop=0, reduction=reduction)
    guides = [out.teacher, *out.assistants]
    share = C if reduction == "mean" else 1
    distilled = sum(kl(guide, out.student, 3.0) for guide in guides) / share
    loss, terms = loss_of(method, out, target)
    same(loss, 0.3 * F.cross_entropy(out.student, target) + 0.7 * distilled, [out.student])
    names = ("kd", "assistant0_kd", "assistant1_kd")
    for name, guide in zip(names, guides, strict=True):
        close(terms[name], kl(guide, out.student, 3.0))


def test_dgkd_without_assistants_is_kd_of_the_mean_form(out, target):
    alone = Outputs(student=out.student, teacher=out.teacher)
    loss, _ = loss_of(METHODS["dgkd"](kd_weight=0.6, drop=0), alone, target)
    kd = METHODS["kd"](temperature=5.0, ce_weight=0.4, kd_weight=0.6, reduction="mean")
    same(loss, loss_of(kd, alone, target)[0], [out.student])


def test_dgkd_drops_each_guide_equally_often_and_exactly_as_many_as_said(out, target):
    torch.manual_seed(0)
    method = METHODS["dgkd"](drop=1)
    values = torch.stack([kl(g, out.student, 5.0) / C for g in (out.teacher, *out.assistants)])
    without = values.sum().detach() - values.detach()  # by the guide that is left out
    assert torch.pdist(without[:, None]).min() > 1e-3
    dropped = [0, 0, 0]
    for _ in range(300):
        loss, _ = loss_of(method, out, target)
        gap = (without - loss.detach()).abs()
        assert gap.min() < 1e-5
        dropped[int(gap.argmin())] += 1
    assert min(dropped) > 70, dropped  # of 100, standard deviation 8
    same(loss, values.sum() - values[int(gap.argmin())], [out.student])


def test_dgkd_draws_from_torchs_generator(out, target):
    losses = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        loss = [loss_of(METHODS["dgkd"](drop=2), out, target)[0].item() for _ in range(8)]
        losses.append(loss)
    assert losses[0] == losses[1]
    assert any(other != losses[0] for other in losses[2:])


def test_dgkd_refuses_to_drop_all(out, target):
    with pytest.raises(ValueError, match="method.drop: 3 leaves none of 3 guides"):
        loss_of(METHODS["dgkd"](drop=3), out, target)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("peers", [1, 2])
def test_dml(out, target, peers, detach):
    method = METHODS["dml"](
        peers=peers, temperature=2.0, ce_weight=0.7, kd_weight=1.3, detach=detach
    )
    assert method.slt_count == peers
    networks = [out.student, *out.slts[:peers]]
    together = Outputs(student=out.student, slts=out.slts[:peers])
    expected = 0.0
    for i, own in enumerate(networks):
        rest = [z.detach() if detach else z for j, z in enumerate(networks) if j != i]
        mutual = sum(kl(z, own, 2.0) for z in rest) / len(rest)
        expected = expected + 0.7 * F.cross_entropy(own, target) + 1.3 * mutual
    loss, terms = loss_of(method, together, target)
    same(loss, expected, networks)
    for i, slt in enumerate(out.slts[:peers]):
        rest = [z for z in networks if z is not slt]
        close(terms[f"slt{i}_kd"], sum(kl(z, slt, 2.0) for z in rest) / len(rest))
        close(terms[f"slt{i}_ce"], F.cross_entropy(slt, target))
        assert int(terms[f"slt{i}_top1"]) == int((slt.argmax(1) == target).sum())


def test_dml_of_equal_networks_is_cross_entropy(out, target):
    equal = Outputs(student=out.student, slts=[out.student.detach().clone().requires_grad_()])
    loss, terms = loss_of(METHODS["dml"](), equal, target)
    close(loss, 2 * F.cross_entropy(out.student, target))
    assert terms["kd"].item() == terms["slt0_kd"].item() == 0
