"""ReviewKD: fusion, the hierarchical loss, levels and warm-up."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from steps import loss_of
from torch import Size, nn
from twenty_steps import losses, made

from kdfuse.engine.methods import METHODS, Networks, Outputs
from kdfuse.engine.methods.parts.pooling import pooled_to
from kdfuse.engine.methods.reviewkd import Fusion, Review, hcl
from kdfuse.engine.models import create, points, shapes

ReviewKD = METHODS["reviewkd"]
TARGET = torch.tensor([0, 1])


def by_hand(fusion, x, deeper=None):
    """A fusion in evaluation mode: 1 x 1 convolutions as products, nearest as repetition."""

    def norm(bn, y):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return (y - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]

    x = norm(fusion.conv1[1], torch.einsum("nchw,oc->nohw", x, fusion.conv1[0].weight[..., 0, 0]))
    if deeper is not None:
        deeper = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
        weight, bias = fusion.attention.weight[..., 0, 0], fusion.attention.bias[:, None, None]
        z = torch.einsum("nchw,oc->nohw", torch.cat([x, deeper], 1), weight) + bias
        z = 1 / (1 + torch.exp(-z))
        x = x * z[:, 0][:, None] + deeper * z[:, 1][:, None]
    y = norm(fusion.conv2[1], F.conv2d(x, fusion.conv2[0].weight, padding=1))
    return y, x


def test_levels_are_fused_from_deep_to_shallow():
    torch.manual_seed(0)
    ours = [Size((1, 5, 4, 4)), Size((1, 6, 2, 2)), Size((1, 7))]
    theirs = [Size((1, 8, 4, 4)), Size((1, 9, 2, 2)), Size((1, 10, 1, 1))]
    review = Review(ours, theirs, max_mid=3).double().eval()
    for bn in review.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
            nn.init.normal_(bn.weight), nn.init.normal_(bn.bias)
    taps = {
        f"s{i}": torch.randn(2, *shape[1:], dtype=torch.float64) for i, shape in enumerate(ours)
    }
    made = review(Outputs(torch.zeros(0), student_taps=taps), TARGET, TARGET)
    expected2, deeper = by_hand(review.levels[2], taps["s2"][:, :, None, None])
    expected1, deeper = by_hand(review.levels[1], taps["s1"], deeper)
    expected0, _ = by_hand(review.levels[0], taps["s0"], deeper)
    assert [made[f"reviewed{i}"].shape[1:] for i in range(3)] == [(8, 4, 4), (9, 2, 2), (10, 1, 1)]
    for i, expected in enumerate([expected0, expected1, expected2]):
        torch.testing.assert_close(made[f"reviewed{i}"], expected)


def test_a_fusion_changes_to_the_teachers_size_before_it_convolves():
    torch.manual_seed(0)
    fusion = Fusion(5, 3, 4, (4, 4), fuses=False).double().eval()
    x = torch.randn(2, 5, 2, 2, dtype=torch.float64)
    y, rest = fusion(x, None)
    expected, _ = by_hand(fusion, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(y, expected)
    assert rest.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 6), (9, 4), (5, 3)])
@pytest.mark.parametrize("side", [4, 2, 1])
def test_pooling_is_adaptive_average_pooling(size, side):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found, expected = pooled_to(x, side, side), F.adaptive_avg_pool2d(x, side)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), x),
        torch.autograd.grad((expected * weight).sum(), x),
    )


@pytest.mark.parametrize(
    ("size", "sides"), [(8, (4, 2, 1)), (7, (4, 2, 1)), (4, (2, 1)), (2, (1,)), (1, ())]
)
def test_the_hierarchical_loss(size, sides):
    student = torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, size, size, dtype=torch.float64)
    weights = [0.5**i for i in range(len(sides) + 1)]
    terms = [F.mse_loss(student, teacher)] + [
        F.mse_loss(F.adaptive_avg_pool2d(student, s), F.adaptive_avg_pool2d(teacher, s))
        for s in sides
    ]
    expected = sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)
    found = hcl(student, teacher)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, student), torch.autograd.grad(expected, student)
    )
    assert torch.autograd.gradcheck(hcl, (student, teacher))
    assert float(hcl(teacher, teacher)) == 0


def outputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3, 8, 8), (2, 4, 4, 4), (2, 5)]
    reviewed = [torch.randn(*s[:2], *(s[2:] or (1, 1)), generator=generator) for s in sizes]
    teacher = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
    return Outputs(
        torch.zeros(2, 4),
        student_taps={f"s{i}": torch.zeros(()) for i in range(3)},
        teacher_taps={f"t{i}": t for i, t in enumerate(teacher)},
        head={f"reviewed{i}": r.to(dtype) for i, r in enumerate(reviewed)},
    )


def test_features_sum_the_levels_and_compile():
    out = outputs()
    t0, t1, t2 = out.teacher_taps.values()
    expected = hcl(out.head["reviewed0"], t0) + hcl(out.head["reviewed1"], t1)
    expected = expected + F.mse_loss(out.head["reviewed2"], t2[:, :, None, None])
    torch.testing.assert_close(ReviewKD().features(out, TARGET), {"reviewkd": expected})
    compiled = torch.compile(ReviewKD().features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(out, TARGET), {"reviewkd": expected})
    half = ReviewKD().features(outputs(torch.bfloat16), TARGET)["reviewkd"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("warmup", "epoch", "share"),
    [(20, 0.0, 0.05), (20, 0.9, 0.05), (20, 9.5, 0.5), (20, 19.0, 1.0), (20, 99.0, 1.0), (0, 0, 1)],
)
def test_it_grows_over_the_warm_up(warmup, epoch, share):
    method, out = ReviewKD(warmup=warmup, feature_weight=5.0), outputs()
    out.teacher = torch.randn(2, 4)
    out.features = method.features(out, TARGET)
    loss, terms = loss_of(method, out, TARGET, epoch)
    expected = terms["ce"] + 5.0 * share * terms["reviewkd"]
    torch.testing.assert_close(loss, expected)


def test_levels_are_the_stages_and_what_is_pooled():
    known = {role: points(create("resnet8", 10)) for role in ("student", "teacher")}
    before = ("stage1.pre", "stage2.pre", "stage3.pre", "pooled")
    after = ("stage1", "stage2", "stage3", "pooled")
    assert ReviewKD().reads(known) == {"student": after, "teacher": before}
    assert ReviewKD(student_relu="before").reads(known) == {"student": before, "teacher": before}


@pytest.mark.parametrize(
    ("student", "teacher", "mid"),
    [("resnet8x4", "resnet32x4", 256), ("resnet8", "wrn_40_2", 64), ("resnet20", "resnet8x4", 64)],
)
def test_reviewed_features_have_the_teachers_shapes(student, teacher, mid):
    networks = {"student": create(student, 10), "teacher": create(teacher, 10)}
    known = {role: points(network) for role, network in networks.items()}
    reads = ReviewKD().reads(known)
    found = {role: shapes(networks[role], names, 16) for role, names in reads.items()}
    head = ReviewKD().head(Networks(10, networks["student"], shapes=found)).eval()
    taps = {name: torch.randn(shape) for name, shape in found["student"].items()}
    made = head(Outputs(torch.zeros(0), student_taps=taps), TARGET, TARGET)
    theirs = found["teacher"].values()
    assert [made[f"reviewed{i}"].shape for i in range(4)] == list(theirs)
    # As the released layers: two convolutions and their BatchNorm, two attention maps but at last.
    ours = [shape[1] for shape in found["student"].values()]
    expected = sum(
        c_in * mid + 2 * mid + 9 * mid * shape[1] + 2 * shape[1]
        for c_in, shape in zip(ours, theirs, strict=True)
    )
    expected += 3 * (2 * 2 * mid + 2)
    assert sum(p.numel() for p in head.parameters()) == expected


def test_the_channels_inside_are_limited():
    ours = {"a": Size((1, 8, 4, 4)), "b": Size((1, 64, 1, 1))}
    networks = Networks(10, nn.Identity(), shapes={"student": ours, "teacher": ours})
    for limit, mid in ((512, 64), (16, 16)):
        head = ReviewKD(max_mid_channels=limit).head(networks)
        assert {level.conv1[0].out_channels for level in head.levels} == {mid}


def test_tokens_are_refused():
    ours = {"blocks": Size((1, 17, 64))}
    networks = Networks(10, nn.Identity(), shapes={"student": ours, "teacher": ours})
    with pytest.raises(ValueError, match=r"the student's blocks gives \(1, 17, 64\)"):
        ReviewKD().head(networks)


def test_an_option_without_effect_is_refused():
    with pytest.raises(ValidationError, match="no effect with student_taps"):
        ReviewKD(student_taps=["a"], student_relu="before")


def test_twenty_steps_lower_it():
    _, distiller = made({"name": "reviewkd", "warmup": 0})
    found = losses(distiller, "reviewkd")
    assert found[-1] < 0.8 * found[0]  # measured: 0.70 at most
