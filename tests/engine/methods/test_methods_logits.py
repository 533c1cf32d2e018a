"""Methods made of one teacher's logits: options against formulas in float64, written here."""

import math

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
        head={"weak": logits(2).detach()},
        average=logits(3).detach(),
    )


@pytest.fixture
def target():
    return torch.tensor([0, 3, 6, 2, 2, 5])


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


def same(loss, expected, wrt):
    """Equal values, and equal gradients for all of `wrt`."""
    close(loss, expected)
    found = torch.autograd.grad(loss, wrt, retain_graph=True)
    for actual, wanted in zip(found, torch.autograd.grad(expected, wrt), strict=True):
        close(actual, wanted)


def run(method, out, target, epoch=0.0):
    """Loss and terms as a branch makes them."""
    out.features = method.features(out, target)
    loss, terms = loss_of(method, out, target, epoch)
    assert all(value.shape == () and not value.requires_grad for value in terms.values())
    return loss, terms


def kl(teacher, student, temperature):
    """(N,) T^2 KL."""
    p, q = F.softmax(teacher / temperature, 1), F.softmax(student / temperature, 1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1)


def at(values, target):
    return values[torch.arange(len(target)), target]


def others(z, target):
    """The logits without the target's, (N, C - 1)."""
    return z[F.one_hot(target, C) == 0].view(N, C - 1)


def tckd(teacher, student, target, temperature):
    b, s = (at(F.softmax(z / temperature, 1), target) for z in (teacher, student))
    rest = (1 - b) * ((1 - b) / (1 - s)).log()
    return temperature**2 * (b * (b / s).log() + rest).mean()


def z_scores(z):
    centred = z - z.sum(1, keepdim=True) / C
    return centred / (1e-7 + (centred.square().sum(1, keepdim=True) / (C - 1)).sqrt())


def counted(terms, out, target):
    """ce and the counts are those of the raw logits."""
    rank = (out.student > out.student.gather(1, target[:, None])).sum(1)
    hits = (int(terms["rows"]), int(terms["top1"]), int(terms["top5"]))
    assert hits == (N, int((rank < 1).sum()), int((rank < 5).sum()))
    close(terms["ce"], F.cross_entropy(out.student, target))


OPTIONS = [
    {"name": "kd", "standardise": True},
    {"name": "kd", "reduction": "mean"},
    {"name": "dkd", "standardise": True},
    {"name": "nkd", "target_term": "t2"},
    {"name": "nkd", "target_term": "t1+t2"},
    {"name": "uskd", "target_term": "t2"},
    {"name": "uskd", "labels": "average"},
    {"name": "dist"},
    {"name": "wsld"},
    {"name": "ctkd"},
    {"name": "ctkd", "over": "dkd"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_bf16_logits_give_float32_losses_of_their_float32_values(options, out, target):
    method = METHODS[options["name"]](**options)
    half = Outputs(
        student=out.student.detach().bfloat16().requires_grad_(),
        teacher=out.teacher.bfloat16(),
        head={"weak": out.head["weak"].bfloat16(), "temperature": torch.tensor(3.0)},
        average=out.average.bfloat16(),
    )
    wide = Outputs(
        student=half.student.detach().float().requires_grad_(),
        teacher=half.teacher.float(),
        head={"weak": half.head["weak"].float(), "temperature": torch.tensor(3.0)},
        average=half.average.float(),
    )
    loss, terms = run(method, half, target)
    wanted, _ = run(method, wide, target)
    assert loss.dtype == torch.float32 and loss.shape == ()
    close(loss, wanted)
    assert all(value.is_floating_point() for value in terms.values())
    counted(terms, wide, target)
    loss.backward()
    wanted.backward()
    assert half.student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.student.grad.float(), wide.student.grad, rtol=2e-2, atol=1e-4)


def test_kd_mean_divides_by_the_classes_too(out, target):
    method = METHODS["kd"](temperature=3.0, ce_weight=0.4, kd_weight=0.6, reduction="mean")
    value = kl(out.teacher, out.student, 3.0).sum()
    expected = 0.4 * F.cross_entropy(out.student, target) + 0.6 * value / (N * C)
    loss, terms = run(method, out, target)
    same(loss, expected, [out.student])
    close(terms["kd"], value / N)
    counted(terms, out, target)


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_kd_of_standardised_logits(out, target, reduction):
    method = METHODS["kd"](
        temperature=2.0, ce_weight=0.1, kd_weight=9.0, standardise=True, reduction=reduction
    )
    value = kl(z_scores(out.teacher), z_scores(out.student), 2.0).mean()
    share = C if reduction == "mean" else 1
    expected = 0.1 * F.cross_entropy(out.student, target) + 9 * value / share
    loss, terms = run(method, out, target)
    same(loss, expected, [out.student])
    close(terms["kd"], value)
    counted(terms, out, target)


def test_dkd_of_standardised_logits(out, target):
    method = METHODS["dkd"](
        temperature=2.0, alpha=9.0, beta=18.0, ce_weight=0.5, warmup=4, standardise=True
    )
    s, t = z_scores(out.student), z_scores(out.teacher)
    nckd = kl(others(t, target), others(s, target), 2.0).mean()
    parts = 9 * tckd(t, s, target, 2.0) + 18 * nckd
    loss, terms = run(method, out, target, epoch=1.0)
    same(loss, 0.5 * F.cross_entropy(out.student, target) + 0.5 * parts, [out.student])
    close(terms["nckd"], nckd)
    counted(terms, out, target)


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_standardised_losses_do_not_see_shift_and_scale(name, out, target):
    method = METHODS[name](standardise=True, ce_weight=0.0)
    before, _ = run(method, out, target)
    gradient = torch.autograd.grad(before, out.student)[0]
    # Neither does the gradient point along them.
    centred = (out.student - out.student.mean(1, keepdim=True)).detach()
    along = torch.stack([gradient.sum(1), (gradient * centred).sum(1)])
    close(along, torch.zeros_like(along))
    scale, shift = 1 + torch.rand(2, N, 1, dtype=torch.float64)
    moved = Outputs(student=out.student * scale + shift, teacher=out.teacher / scale - shift)
    close(run(method, moved, target)[0], before)
    own = Outputs(student=out.student, teacher=(out.student * 3 - 1).detach())
    assert run(method, own, target)[0].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_a_row_of_equal_logits_has_a_finite_gradient(name, out, target):
    flat = Outputs(student=torch.zeros(N, C, requires_grad=True), teacher=out.teacher)
    loss, _ = run(METHODS[name](standardise=True), flat, target)
    assert torch.autograd.grad(loss, flat.student)[0].isfinite().all()


def halves(w, s):
    return {
        "t1": -(w * s.log()).mean(),
        "t2": -((1 - w) * (1 - s).log()).mean(),
        "t1+t2": -(w * s.log() + (1 - w) * (1 - s).log()).mean(),
    }


@pytest.mark.parametrize("form", ["t1", "t2", "t1+t2"])
def test_nkd_target_terms(out, target, form):
    method = METHODS["nkd"](temperature=2.0, gamma=1.2, ce_weight=0.8, target_term=form)
    s, v = (at(F.softmax(z, 1), target) for z in (out.student, out.teacher))
    own, taught = (others(z, target) / 2 for z in (out.student, out.teacher))
    rest = -(F.softmax(taught, 1) * F.log_softmax(own, 1)).sum(1).mean()
    wanted = halves(v, s)[form]
    loss, terms = run(method, out, target)
    expected = 0.8 * F.cross_entropy(out.student, target) + wanted + 1.2 * 4 * rest
    same(loss, expected, [out.student])
    close(terms["target"], wanted)


def test_t1_and_t2_together_pull_as_dkds_target_part(out, target):
    method = METHODS["nkd"](gamma=0.0, ce_weight=0.0, target_term="t1+t2")
    found = torch.autograd.grad(run(method, out, target)[0], out.student)[0]
    expected = torch.autograd.grad(tckd(out.teacher, out.student, target, 1.0), out.student)[0]
    close(found, expected)


def test_t2_of_a_certain_student_is_finite(target):
    certain = (60.0 * F.one_hot(target, C)).requires_grad_()  # 1 - S_t underflows in float32
    out = Outputs(student=certain, teacher=torch.zeros(N, C))
    loss, _ = run(METHODS["nkd"](gamma=0.0, ce_weight=0.0, target_term="t2"), out, target)
    close(loss, torch.tensor((1 - 1 / C) * (60 - math.log(C - 1))))
    assert torch.autograd.grad(loss, certain)[0].isfinite().all()


@pytest.mark.parametrize("labels", ["square", "plain", "average"])
@pytest.mark.parametrize("form", ["t1", "t2", "t1+t2"])
def test_uskd_target_terms(out, target, form, labels):
    method = METHODS["uskd"](alpha=0.7, target_term=form, labels=labels)
    assert method.uses_average == (labels == "average")
    s = at(F.softmax(out.student, 1), target)
    w = {
        "square": (s**2 + 1 - (s**2).mean()).detach(),
        "plain": (s + 1 - s.mean()).detach(),
        "average": at(F.softmax(out.average, 1), target),
    }[labels]
    wanted = halves(w, s)[form]
    rest, _ = run(METHODS["uskd"](alpha=0.0), out, target)
    loss, terms = run(method, out, target)
    close(terms["target"], wanted)
    found, around = (torch.autograd.grad(x, out.student)[0] for x in (loss, rest))
    close(loss - rest, 0.7 * wanted)
    close(found - around, torch.autograd.grad(0.7 * wanted, out.student)[0])


def pearson(a, b):
    """Mean correlation of the rows of two matrices."""
    found = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
    )
    return found.mean()


def test_dist(out, target):
    method = METHODS["dist"](temperature=3.0, ce_weight=0.5, kd_weight=2.5, beta=0.7, gamma=1.3)
    s, t = (F.softmax(z / 3, 1) for z in (out.student, out.teacher))
    inter, intra = 9 * (1 - pearson(s, t)), 9 * (1 - pearson(s.T, t.T))
    expected = 0.5 * F.cross_entropy(out.student, target) + 2.5 * (0.7 * inter + 1.3 * intra)
    loss, terms = run(method, out, target)
    same(loss, expected, [out.student])
    close(terms["inter"], inter)
    close(terms["intra"], intra)


def test_dist_does_not_see_affine_maps(out, target):
    """A teacher whose rows are a * student + b has the same inter-class relations; with one a and
    b for all rows the same intra-class relations too."""
    s = F.softmax(out.student.detach(), 1)
    for a in (0.3, torch.linspace(0.2, 0.9, N, dtype=torch.float64)[:, None]):
        taught = Outputs(student=out.student, teacher=(a * s + (1 - a) / C).log())
        found = METHODS["dist"]().features(taught, target)
        assert found["inter"].item() == pytest.approx(0.0, abs=1e-5)
        assert (found["intra"].item() < 1e-5) == isinstance(a, float)
    own = Outputs(student=out.student, teacher=out.student.detach())
    assert all(abs(v.item()) < 1e-5 for v in METHODS["dist"]().features(own, target).values())


def test_dist_of_a_student_that_knows_nothing_is_finite(out, target):
    flat = Outputs(student=torch.zeros(N, C, requires_grad=True), teacher=out.teacher)
    loss, terms = run(METHODS["dist"](), flat, target)
    assert terms["inter"].item() == 1.0 and terms["intra"].item() == 1.0
    assert torch.autograd.grad(loss, flat.student)[0].isfinite().all()


def test_dist_compiles_whole(out, target):
    method = METHODS["dist"](temperature=4.0)
    compiled = torch.compile(method.features, fullgraph=True, backend="aot_eager")
    for name, value in compiled(out, target).items():
        same(value, method.features(out, target)[name].double(), [out.student])


def test_wsld(out, target):
    method = METHODS["wsld"](temperature=2.0, ce_weight=0.8, kd_weight=2.5)
    ce_s, ce_t = (-at(F.log_softmax(z, 1), target) for z in (out.student, out.teacher))
    w = (1 - torch.exp(-ce_s / ce_t)).detach()
    p, log_q = F.softmax(out.teacher / 2, 1), F.log_softmax(out.student / 2, 1)
    released = 0.8 * ce_s.mean() + 2.5 * 4 * (w * -(p * log_q).sum(1)).mean()
    loss, terms = run(method, out, target)
    found, wanted = (torch.autograd.grad(x, out.student)[0] for x in (loss, released))
    close(found, wanted)
    entropy = -(p * p.log()).sum(1)
    close(loss, released - 2.5 * 4 * (w * entropy).mean())
    close(terms["kd"], (w * kl(out.teacher, out.student, 2.0)).mean())
    close(terms["weight"], w.mean())


def test_wsld_weighs_nothing_where_the_student_is_certain(out, target):
    certain = 200.0 * F.one_hot(target, C).double()
    own = Outputs(student=certain.requires_grad_(), teacher=out.teacher)
    loss, terms = run(METHODS["wsld"](), own, target)
    assert loss.item() == 0 and terms["weight"].item() == 0 and terms["kd"].item() == 0
    assert torch.autograd.grad(loss, certain)[0].abs().max() < 1e-30


def with_temperature(method, out, target):
    """Outputs with what the method's head gives, and the head's parameter."""
    head = method.head(Networks(C, nn.Identity()))
    (theta,) = head.parameters()
    out.head |= head(out, target, target)
    return theta


def test_ctkd_starts_at_the_published_temperature(out, target):
    theta = with_temperature(METHODS["ctkd"](), out, target)
    assert theta.shape == () and theta.item() == 1
    assert out.head["temperature"].item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0.0, -0.024472), (0.99, -0.024472), (4.0, -0.5), (9.0, -1.0), (200.0, -1.0)],
)
@pytest.mark.parametrize("over", ["kd", "dkd"])
def test_ctkd_reverses_the_gradient_of_its_temperature(out, target, over, epoch, factor):
    own = {"kd_weight": 0.9} if over == "kd" else {"alpha": 1.5, "beta": 2.5}
    method = METHODS["ctkd"](over=over, ce_weight=0.3, start=1.0, span=6.0, **own)
    theta = with_temperature(method, out, target)
    free = torch.ones((), dtype=torch.float64, requires_grad=True)
    t = 1 + 6 / (1 + (-free).exp())
    if over == "kd":
        value = 0.9 * kl(out.teacher, out.student, t).mean()
    else:
        nckd = kl(others(out.teacher, target), others(out.student, target), t).mean()
        value = 1.5 * tckd(out.teacher, out.student, target, t) + 2.5 * nckd
    expected = 0.3 * F.cross_entropy(out.student, target) + value
    loss, terms = run(method, out, target, epoch)
    close(terms["temperature"], t.detach())
    counted(terms, out, target)
    close(loss, expected)
    student, pull = torch.autograd.grad(loss, [out.student, theta])
    wanted, free_pull = torch.autograd.grad(expected, [out.student, free])
    close(student, wanted)
    close(pull, factor * free_pull)
    assert pull.sign() == -free_pull.sign()


@pytest.mark.parametrize("over", ["kd", "dkd"])
def test_ctkd_at_its_temperature_is_the_fused_loss(out, target, over):
    method = METHODS["ctkd"](over=over)
    out.student, out.teacher = out.student.float(), out.teacher.float()
    with_temperature(method, out, target)
    t = out.head["temperature"].item()
    options = {"kd": {}, "dkd": {"beta": 2.0, "warmup": 0}}[over]
    fused, terms = run(METHODS[over](temperature=t, **options), out, target)
    loss, found = run(method, out, target)
    close(loss, fused)
    assert found.keys() == {*terms, "temperature"}
    for name, value in terms.items():
        # T^2 times a difference of logarithms, in float32
        torch.testing.assert_close(found[name].float(), value.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "kd", "beta": 3.0}, "method.beta: 3.0 has no effect with over kd"),
        ({"over": "dkd", "kd_weight": 1.0}, "method.kd_weight: 1.0 has no effect with over dkd"),
        ({"start": 0.0}, "greater than 0"),
    ],
)
def test_ctkd_refuses(options, message):
    with pytest.raises(ValidationError, match=message):
        METHODS["ctkd"](**options)


def test_ctkd_over_dkd_refuses_two_classes():
    with pytest.raises(ValueError, match="method.over: dkd with 2 classes"):
        METHODS["ctkd"](over="dkd").head(Networks(2, nn.Identity()))
