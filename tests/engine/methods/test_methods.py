"""Methods: each passes its options to its loss, which is checked against formulas written here."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from steps import loss_of
from torch import nn

from kdfuse.engine.methods import METHODS, Networks, Outputs

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
        head={"weak": logits(4)},
    )


@pytest.fixture
def target():
    return torch.tensor([0, 3, 6, 2, 2, 5])


def soft(z, temperature):
    return F.softmax(z / temperature, 1)


def kl(teacher, student, temperature):
    p, q = soft(teacher, temperature), soft(student, temperature)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def others(z, target):
    """The logits without the target's, (N, C - 1)."""
    keep = F.one_hot(target, C) == 0
    return z[keep].view(N, C - 1)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_every_method_is_known_by_its_name():
    assert all(method().name == name for name, method in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_unknown_options_are_refused(name):
    with pytest.raises(ValidationError, match="temprature"):
        METHODS[name](temprature=4.0)


LOGITS = [
    "ce",
    "kd",
    "dkd",
    "nkd",
    "wttm",
    "tf_nkd",
    "uskd",
    "slkd",
]  # made of logits alone, or nearly


@pytest.mark.parametrize("name", LOGITS)
def test_loss_is_a_scalar_and_terms_are_detached(name, out, target):
    loss, terms = loss_of(METHODS[name](), out, target)
    assert loss.shape == () and loss.requires_grad
    assert all(value.shape == () and not value.requires_grad for value in terms.values())
    rank = (out.student > out.student.gather(1, target[:, None])).sum(1)
    counted = (int(terms["rows"]), int(terms["top1"]), int(terms["top5"]))
    assert counted == (N, int((rank < 1).sum()), int((rank < 5).sum()))
    close(terms["ce"], F.cross_entropy(out.student, target))


@pytest.mark.parametrize("name", LOGITS)
def test_bf16_logits_give_a_float32_loss(name, out, target):
    half = Outputs(
        student=out.student.bfloat16(),
        teacher=out.teacher.bfloat16(),
        slts=[z.bfloat16() for z in out.slts],
        head={"weak": out.head["weak"].bfloat16()},
    )
    assert loss_of(METHODS[name](), half, target)[0].dtype == torch.float32


def test_ce(out, target):
    close(loss_of(METHODS["ce"](), out, target)[0], F.cross_entropy(out.student, target))


def test_kd(out, target):
    method = METHODS["kd"](temperature=3.0, ce_weight=0.3, kd_weight=0.7)
    ce = F.cross_entropy(out.student, target)
    expected = 0.3 * ce + 0.7 * kl(out.teacher, out.student, 3.0)
    close(loss_of(method, out, target)[0], expected)


@pytest.mark.parametrize(
    ("epoch", "share"), [(0.0, 0.25), (0.99, 0.25), (1.0, 0.5), (3.5, 1.0), (9.0, 1.0)]
)
def test_dkd_grows_over_the_warm_up(out, target, epoch, share):
    method = METHODS["dkd"](temperature=2.0, alpha=1.5, beta=3.0, ce_weight=0.5, warmup=4)
    ce = F.cross_entropy(out.student, target)
    b_t, b_s = (soft(z, 2.0).gather(1, target[:, None])[:, 0] for z in (out.teacher, out.student))
    rest = (1 - b_t) * ((1 - b_t) / (1 - b_s)).log()
    tckd = 4 * (b_t * (b_t / b_s).log() + rest).mean()
    nckd = kl(others(out.teacher, target), others(out.student, target), 2.0)
    expected = 0.5 * ce + share * (1.5 * tckd + 3.0 * nckd)
    close(loss_of(method, out, target, epoch)[0], expected)


def test_dkd_without_warm_up_is_full_from_the_start():
    assert METHODS["dkd"](warmup=0).schedule(0.0) == {}


def test_nkd(out, target):
    method = METHODS["nkd"](temperature=2.0, gamma=1.2, ce_weight=0.8)
    log_s = F.log_softmax(out.student, 1).gather(1, target[:, None])[:, 0]
    v_t = soft(out.teacher, 1.0).gather(1, target[:, None])[:, 0]
    v, s = (soft(others(z, target), 2.0) for z in (out.teacher, out.student))
    non_target = -(v * s.log()).sum(1).mean()
    expected = -0.8 * log_s.mean() - (v_t * log_s).mean() + 1.2 * 4 * non_target
    close(loss_of(method, out, target)[0], expected)


@pytest.mark.parametrize("weighted", (True, False))
def test_wttm(out, target, weighted):
    method = METHODS["wttm"](temperature=2.5, kd_weight=1.2, ce_weight=0.8, weighted=weighted)
    powered = soft(out.teacher, 1.0) ** (1 / 2.5)
    u = powered.sum(1)
    kd = (soft(out.teacher, 2.5) * (soft(out.teacher, 2.5) / soft(out.student, 1.0)).log()).sum(1)
    kd = (u * kd if weighted else kd).mean()
    loss, terms = loss_of(method, out, target)
    close(terms["kd"], kd)
    close(loss, 0.8 * F.cross_entropy(out.student, target) + 1.2 * kd)


def test_tf_nkd(out, target):
    method = METHODS["tf_nkd"](weight=0.6, ce_weight=0.9)
    s = soft(out.student, 1.0).gather(1, target[:, None])[:, 0]
    weight = (s + 1 - s.mean()).detach()
    expected = -0.9 * s.log().mean() - 0.6 * (weight * s.log()).mean()
    close(loss_of(method, out, target)[0], expected)


@pytest.mark.parametrize("rank", ["released", "paper"])
def test_uskd(out, target, rank):
    method = METHODS["uskd"](alpha=0.7, beta=0.2, mu=0.05, ce_weight=0.9, rank=rank)
    weak, one_hot = out.head["weak"], F.one_hot(target, C)
    s, w = soft(out.student, 1.0), soft(weak, 1.0)
    s_t, w_t = ((p * one_hot).sum(1, keepdim=True) for p in (s, w))
    smooth = (s_t**2 + 1 - (s_t**2).mean()).detach()
    target_term = -(smooth * s_t.log()).mean()
    from_student = s / (1 - s_t + 1e-6) if rank == "paper" else s.log() / (1 - s_t.log() + 1e-6)
    score = w / (1 - w_t + 1e-6) + from_student
    place = (score[:, None, :] > score[:, :, None]).sum(2)  # 0 for the highest
    zipf = others(1 / (1 + place.double()), target)
    zipf = zipf / zipf.sum(1, keepdim=True)
    non_target = -(zipf * F.log_softmax(others(out.student, target), 1)).sum(1).mean()
    smoothed = 0.9 * one_hot + 0.1 / C
    weak_term = -(smoothed * F.log_softmax(weak, 1)).sum(1).mean()
    ce = F.cross_entropy(out.student, target)
    expected = 0.9 * ce + 0.7 * target_term + 0.2 * non_target + 0.05 * weak_term
    close(loss_of(method, out, target)[0], expected)


def test_uskd_head_reads_the_mean_of_maps_and_of_tokens(target):
    for shape, places in ((2, 5, 4, 4), (2, 3)), ((2, 9, 5), (1,)):
        feature = torch.randn(shape, requires_grad=True)
        networks = Networks(C, nn.Identity(), shapes={"student": {"stage2": feature.shape}})
        head = METHODS["uskd"]().head(networks)
        out = Outputs(torch.empty(0), student_taps={"stage2": feature})
        weight, bias = head.classifier.weight, head.classifier.bias
        weak = head(out, target, target)["weak"]
        close(weak, feature.mean(places) @ weight.T + bias)


def test_slkd(out, target):
    method = METHODS["slkd"](
        temperature=3.0,
        ce_weight=0.2,
        kd_weight=0.8,
        fused_ce_weight=0.5,
        fused_kd_weight=0.6,
        fusion=[0.25, 0.75],
    )
    fused = (0.25 * out.slts[0] + 0.75 * out.slts[1]).detach()
    expected = 0.5 * F.cross_entropy(out.student, target) + 0.6 * kl(fused, out.student, 3.0)
    for z in (out.student, *out.slts):
        expected = expected + 0.2 * F.cross_entropy(z, target) + 0.8 * kl(out.teacher, z, 3.0)
    loss = loss_of(method, out, target)[0]
    close(loss, expected)
    wrt = (out.student, *out.slts)
    for actual, wanted in zip(
        torch.autograd.grad(loss, wrt), torch.autograd.grad(expected, wrt), strict=True
    ):
        close(actual, wanted)


def test_slkd_detached_or_not_changes_only_the_slts_gradients(out, target):
    grads = {}
    for detach in (True, False):
        loss = loss_of(METHODS["slkd"](detach_slts=detach), out, target)[0]
        grads[detach] = torch.autograd.grad(loss, (out.student, *out.slts))
    close(grads[True][0], grads[False][0])
    assert (grads[True][1] - grads[False][1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slts": 3, "fusion": [0.5, 0.5]}, "2 weights for slts = 3"),
        ({"fusion": [0.5, 0.6]}, "must sum to 1"),
        ({"slts": 0}, "greater than or equal to 1"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
)
def test_slkd_refuses(options, message):
    with pytest.raises(ValidationError, match=message):
        METHODS["slkd"](**options)
