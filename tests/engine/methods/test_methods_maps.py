"""AT, NST, FitNet, VID and KDSVD against float64 formulas."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from features import (
    TARGET,
    check,
    check_compiled,
    check_learns,
    largest,
    leaves,
    normal,
    outputs,
    with_head,
)
from pydantic import ValidationError
from torch import Size, nn

from kdfuse.engine.methods import METHODS, Networks, Outputs
from kdfuse.engine.methods.fitnet import regressor
from kdfuse.engine.methods.kdsvd import EPS, right_vectors
from kdfuse.engine.methods.parts.maps import same_size

# At the first taps the student's map is larger, at the second smaller, at the third neither.
SHAPES = [(4, 8, 8), (5, 4, 6), (6, 5, 5)], [(7, 4, 4), (3, 8, 12), (8, 5, 5)]
TERMS = {"fitnet": ("hint",), "at": ("at",), "nst": ("nst",), "vid": ("vid",), "kdsvd": ("kdsvd",)}
PLAIN = ("at", "nst", "kdsvd")  # without a head


def halved(x):
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))


def pairs(out):
    """The pairs of SHAPES in float64, of one size."""
    s, t = ([x.double() for x in taps.values()] for taps in (out.student_taps, out.teacher_taps))
    return [(halved(s[0]), t[0]), (s[1], halved(t[1])), (s[2], t[2])]


def at(out, power=2):
    total = 0
    for pair in pairs(out):
        q_s, q_t = (
            q / q.square().sum((1, 2), keepdim=True).sqrt()
            for q in ((f**power).sum(1) for f in pair)
        )
        total = total + (q_s - q_t).square().mean()
    return {"at": total}


def nst(out):
    """With every product of two channels' maps, (N, C, C', H * W)."""

    def kernel(a, b):
        a, b = (x.flatten(2) / x.flatten(2).square().sum(2, keepdim=True).sqrt() for x in (a, b))
        return (a[:, :, None] * b[:, None]).sum(3).square().mean()

    return {"nst": sum(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in pairs(out))}


def kdsvd(out, rank=1):
    """By the singular value decomposition and its derivative."""
    stages = []
    for pair in pairs(out):
        (v_s, _), (v_t, values) = (
            (v.mT, s)
            for _, s, v in (torch.linalg.svd(x.flatten(1, 2), full_matrices=False) for x in pair)
        )
        scale = values[:, :rank] / values[:, :rank].square().sum(1, keepdim=True).sqrt()
        found = []
        for n in range(len(v_t)):
            for k in range(rank):
                t = v_t[n, :, k] * v_t[n, :, k].sum().sign()
                cosines = v_s[n, :, : rank + 3].T @ t
                best = cosines.abs().argmax()
                s = v_s[n, :, best] * cosines[best].sign()
                found.append((s * scale[n, k], t * scale[n, k]))
        stages.append([torch.stack(v).unflatten(0, (-1, rank)) for v in zip(*found, strict=True)])
    total = 0
    for before, after in zip(stages, stages[1:], strict=False):
        r_s, r_t = (
            torch.exp(-((b[:, :, None, :] - a[:, :, :, None]) ** 2) / 8)
            for a, b in zip(before, after, strict=True)
        )
        total = total + (r_s - r_t).square().sum() / len(r_s)
    return {"kdsvd": total}


FORMULAS = {"at": at, "nst": nst, "kdsvd": kdsvd}


@pytest.mark.parametrize("name", PLAIN)
def test_values_and_gradients(name):
    check(METHODS[name](), outputs(*SHAPES), FORMULAS[name])


def test_at_to_another_power():
    check(METHODS["at"](power=3), outputs(*SHAPES), lambda out: at(out, 3))


def test_kdsvd_of_two_vectors():
    check(METHODS["kdsvd"](rank=2), outputs(*SHAPES), lambda out: kdsvd(out, 2), rtol=1e-3)


def test_nst_by_channels_and_by_places():
    """Either form, whichever is less work, is the same number."""
    for c_s, c_t in ((2, 3), (60, 50)):
        shapes = [(c_s, 8, 8), (c_s, 4, 4), (c_s, 3, 3)], [(c_t, 4, 4), (c_t, 8, 8), (c_t, 3, 3)]
        check(METHODS["nst"](), outputs(*shapes, n=2), nst)


def test_nst_makes_nothing_larger_than_its_maps_and_products():
    few = outputs([(6, 8, 8)], [(9, 8, 8)], dtype=torch.float32)
    assert largest(METHODS["nst"](), few) == 6 * 9 * 64  # the teacher's map
    many = outputs([(60, 4, 4)], [(90, 4, 4)], dtype=torch.float32)
    assert largest(METHODS["nst"](), many) == 6 * 90 * 16  # not 60 x 90 channels


@pytest.mark.parametrize("name", PLAIN)
def test_a_student_that_is_its_teacher_has_no_loss(name):
    for shapes in [(3, 4, 4), (5, 4, 4)], [(90, 3, 3), (80, 3, 3)]:
        out = outputs(shapes, shapes)
        out.teacher_taps = out.student_taps
        (value,) = METHODS[name]().features(out, TARGET).values()
        assert abs(value.item()) < 1e-12


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("at", lambda x: -3 * x),
        ("at", lambda x: x.flip(1)),
        ("nst", lambda x: x * torch.arange(1, 1 + x.shape[1])[:, None, None]),
        ("nst", lambda x: x.flip(1)),
        ("kdsvd", lambda x: -3 * x),
        ("kdsvd", lambda x: x.flip(1)),
        ("kdsvd", lambda x: x.flip(2)),
    ],
)
def test_what_changes_no_pattern_changes_no_loss(name, change):
    out = outputs(*SHAPES)
    changed = replace(out, student_taps={k: change(x) for k, x in out.student_taps.items()})
    for other in (changed, replace(out, teacher_taps=out.teacher_taps)):
        torch.testing.assert_close(
            METHODS[name]().features(other, TARGET),
            METHODS[name]().features(out, TARGET),
            rtol=1e-4,
            atol=1e-7,
        )


def test_empty_maps_have_finite_losses_and_gradients():
    for name in PLAIN:
        out = outputs(*SHAPES, dtype=torch.float32)
        for taps in (out.student_taps, out.teacher_taps):
            for x in taps.values():
                x.data[0] = 0  # an image that no channel answers to
                x.data[1, 0] = 0
        (value,) = METHODS[name]().features(out, TARGET).values()
        assert value.isfinite()
        for gradient in torch.autograd.grad(value, leaves(out)):
            assert gradient.isfinite().all() and gradient.abs().max() > 0


def near_pairs(gap, dtype):
    """Maps (8, 2, 3, 4) of norm 1: the eigenvalues of M'M are two pairs, each `gap` apart."""
    left, _ = torch.linalg.qr(normal(8, 6, 4, seed=0))
    right, _ = torch.linalg.qr(normal(8, 4, 4, seed=1))
    values = torch.tensor([0.35 + gap, 0.35, 0.15, 0.15 - gap], dtype=torch.float64)
    return (left * values.sqrt() @ right.mT).unflatten(1, (2, 3)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [1e4, 1, 1e-8])
def test_kdsvd_has_bounded_gradients_however_near_two_singular_values_are(scale, dtype):
    for gap in (0, *(10.0**n for n in range(-12, -1)), EPS):
        maps = near_pairs(gap, dtype)
        vectors, _ = right_vectors(scale * maps, 4)
        for seed in range(4):
            upstream = normal(*vectors.shape, seed=seed, dtype=dtype)
            (gradient,) = torch.autograd.grad(vectors, maps, upstream, retain_graph=True)
            bound = 1.14 / EPS * upstream.flatten(1).norm(dim=1)
            assert (gradient.flatten(1).norm(dim=1) <= bound).all(), gap


@pytest.mark.parametrize("gap", [7e-3, 2e-2, 0.1])
def test_kdsvd_has_the_true_derivative_where_singular_values_are_apart(gap):
    maps = near_pairs(gap, torch.float64)
    vectors, values = right_vectors(maps, 4)
    _, expected, true = torch.linalg.svd(maps.flatten(1, 2), full_matrices=False)
    true = true.mT * (true.mT * vectors.detach()).sum(1, keepdim=True).sign()
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(vectors, true)
    upstream = normal(*vectors.shape, seed=0)
    found, wanted = (torch.autograd.grad(v, maps, upstream)[0] for v in (vectors, true))
    assert (found - wanted).norm() < 1e-7 * wanted.norm()


@pytest.mark.parametrize(
    "sizes", [((8, 6), (4, 3)), ((4, 3), (8, 6)), ((8, 3), (4, 6)), ((7, 5), (3, 4))]
)
def test_larger_maps_are_averaged(sizes):
    student, teacher = (normal(2, 3, *size, seed=i) for i, size in enumerate(sizes))
    size = tuple(map(min, *sizes))
    for actual, x in zip(same_size(student, teacher), (student, teacher), strict=True):
        torch.testing.assert_close(actual, F.adaptive_avg_pool2d(x, size))


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel"),
    [
        ((8, 8), (4, 4), nn.Conv2d, (3, 3)),
        ((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4)),
        ((8, 8), (8, 8), nn.Conv2d, (1, 1)),
        ((9, 8), (7, 7), nn.Conv2d, (3, 2)),
    ],
)
def test_fitnet_regresses_to_the_teachers_shape(student, teacher, kind, kernel):
    layers = regressor(Size((1, 3, *student)), Size((1, 5, *teacher)))
    conv, norm, relu = layers
    assert type(conv) is kind and conv.kernel_size == kernel and conv.bias is not None
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(relu, nn.ReLU)
    assert layers(normal(2, 3, *student, seed=0, dtype=torch.float32)).shape == (2, 5, *teacher)


def test_fitnet_refuses_a_map_that_is_smaller_by_another_factor():
    with pytest.raises(ValueError, match=r"student's 4 x 4 map to the teacher's 12 x 12"):
        regressor(Size((1, 3, 4, 4)), Size((1, 3, 12, 12)))


def test_fitnet():
    method = METHODS["fitnet"]()
    out = outputs([(3, 8, 8), (4, 4, 4)], [(5, 4, 4), (2, 8, 8)])
    head = with_head(method, out)

    def hint(out):
        total = 0
        taps = zip(out.student_taps.values(), out.teacher_taps.values(), strict=True)
        for (x, t), (conv, norm, _) in zip(taps, head.regressors, strict=True):
            y = conv(x)
            mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), False, keepdim=True)
            y = (y - mean) / (var + norm.eps).sqrt()
            total = total + (y.clamp(min=0) - t).square().mean()
        return {"hint": total}

    check(method, out, hint)


@pytest.mark.parametrize("variance", ["trained", "fixed"])
def test_vid(variance):
    method = METHODS["vid"](variance=variance, first_variance=2.5)
    out = outputs(*SHAPES)
    head = with_head(method, out)
    weights = [w for name, w in head.named_parameters() if "scale" not in name]

    def vid(out):
        total = 0
        for i, (x, t) in enumerate(pairs(out)):
            first, second, third = (w[:, :, 0, 0] for w in weights[3 * i : 3 * i + 3])
            y = torch.einsum("oc,nchw->nohw", first, x).clamp(min=0)
            y = torch.einsum("oc,nchw->nohw", second, y).clamp(min=0)
            y = torch.einsum("oc,nchw->nohw", third, y)
            v = (1 + getattr(head, f"scale{i}").exp()).log() + 1e-5
            v = v.view(1, -1, 1, 1)
            total = total + 0.5 * ((y - t) ** 2 / v + v.log()).mean()
        return {"vid": total}

    check(method, out, vid)
    for i in range(3):
        torch.testing.assert_close(
            out.head[f"variance{i}"].detach(), torch.full((SHAPES[1][i][0],), 2.5).double()
        )
    scales = {name for name, _ in head.named_parameters() if "scale" in name}
    assert scales == ({"scale0", "scale1", "scale2"} if variance == "trained" else set())
    assert {"scale0", "scale1", "scale2"} <= head.state_dict().keys()


def test_vid_learns_the_variance_of_what_it_cannot_foresee():
    """With mu fixed at 0, the loss is least where v is the mean square of the teacher."""
    method, out = METHODS["vid"](), outputs([(2, 4, 4)], [(3, 4, 4)])
    head = with_head(method, out)
    teacher = out.teacher_taps["stage0"]
    for parameter in head.means.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        wanted = teacher.square().mean((0, 2, 3))
        head.scale0.copy_((wanted - 1e-5).expm1().log())
    out.head = head(out, TARGET, TARGET)
    loss = method.features(out, TARGET)["vid"]
    (gradient,) = torch.autograd.grad(loss, head.scale0)
    torch.testing.assert_close(gradient, torch.zeros(3).double(), rtol=0, atol=1e-6)
    least = 0.5 + wanted.log().mean() / 2
    torch.testing.assert_close(loss.detach().double(), least, rtol=1e-5, atol=0)


def test_vid_begins_at_the_published_variance():
    head = with_head(METHODS["vid"](), outputs([(2, 4, 4)], [(3, 4, 4)]))
    expected = math.log(math.exp(5 - 1e-5) - 1)
    torch.testing.assert_close(head.scale0.detach(), torch.full((3,), expected).double())


@pytest.mark.parametrize("name", TERMS)
def test_bf16_features_are_compared_in_float32(name):
    method, half = METHODS[name](), outputs(*SHAPES, dtype=torch.bfloat16)
    with_head(method, half)
    full = Outputs(half.student, half.teacher)
    for part in ("student_taps", "teacher_taps", "head"):
        setattr(full, part, {k: x.float() for k, x in getattr(half, part).items()})
    (expected,), (found,) = (method.features(out, TARGET).values() for out in (full, half))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", TERMS)
def test_compiled_in_one_graph(name):
    out = outputs(*SHAPES, dtype=torch.float32)
    with_head(METHODS[name](), out)
    check_compiled(METHODS[name](), out)


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in TERMS), ("vid", {"variance": "fixed"})]
)
def test_steps_lower_the_loss(name, options):
    floor = 1.5 * math.log(5) if name == "vid" else 0.0  # what the first variances cost
    distiller = check_learns(name, TERMS[name], floor, **options)
    assert (distiller.main.head is None) == (name in PLAIN)


NAMED = {"stem": "a", "stage1": "b", "stage2": "c", "stage2.pre": "d", "stage3": "e", "pooled": "f"}


@pytest.mark.parametrize(
    ("name", "weight"), [("fitnet", 100), ("at", 1000), ("nst", 50), ("vid", 1), ("kdsvd", 1)]
)
def test_published_taps_and_weights(name, weight):
    method = METHODS[name]()
    expected = ("stage2",) if name == "fitnet" else ("stage1", "stage2", "stage3")
    reads = method.reads({"student": NAMED, "teacher": NAMED})
    assert reads == {"student": expected, "teacher": expected}
    assert (method.feature_weight, method.ce_weight, method.kd_weight) == (weight, 1, 0)


@pytest.mark.parametrize("name", TERMS)
def test_features_that_are_no_maps_are_refused(name):
    shapes = {"student": {"stage1": Size((1, 3, 4, 4))}, "teacher": {"norm": Size((1, 17, 8))}}
    with pytest.raises(ValueError, match=r"method.teacher_taps: norm gives \(1, 17, 8\)"):
        METHODS[name]().head(Networks(10, nn.Identity(), shapes=shapes))


def test_kdsvd_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="reads only stage1 of the student; name two points"):
        METHODS["kdsvd"]().reads({"student": {"stage1": "a"}, "teacher": {"stage1": "a"}})
    shapes = {role: {"stage1": Size((1, 3, 4, 2))} for role in ("student", "teacher")}
    with pytest.raises(ValueError, match="rank: 3 singular vectors of a map that is 2 wide"):
        METHODS["kdsvd"](rank=3).head(Networks(10, nn.Identity(), shapes=shapes))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("at", {"power": 0.5}, "greater than or equal to 1"),
        ("vid", {"first_variance": 0.0}, "greater than 0.00001|greater than 1e-05"),
        ("vid", {"variance": "learned"}, "'trained' or 'fixed'"),
        ("kdsvd", {"rank": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_are_refused(name, options, message):
    with pytest.raises(ValidationError, match=message):
        METHODS[name](**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_taps": []}, "student_taps"),
        ({"student_taps": ["a", "a"], "teacher_taps": ["a", "b"]}, "student_taps: a point stands"),
        ({"temperature": 2.0}, "no effect with kd_weight 0"),
    ],
)
def test_taps_and_temperature_that_would_not_be_read_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        METHODS["at"](**options)
