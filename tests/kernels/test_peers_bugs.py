"""Failures of other libraries' distillation losses, as tests of these.

Each test says what went wrong elsewhere; the first five were reproduced there.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from calls import (
    FULL,
    NAMES,
    NO_TEACHER,
    SCALED,
    WITH_PROBABILITIES,
    WITH_TEACHER,
    Case,
    call,
    cast,
    loss_and_gradients,
    make,
    probabilities,
)

import kdfuse
from kdfuse.kernels import backends
from kdfuse.kernels.table import OPS

BACKENDS = [name for name in ("reference", "cpu") if not backends.backends()[name]]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("c", (64, 3000))
@pytest.mark.parametrize("name", NAMES)
def test_first_tile_all_minus_infinity(name, backend, c):
    """A running maximum of -inf minus -inf gave NaN, though the row is a fine distribution."""
    case = cast(make(name, 4, c), torch.float32)
    for x in (*case.students[:1], *case.teachers):
        x[:, : c // 2] = -torch.inf
    if name == "slkd":
        for x in case.students:
            x[:, : c // 2] = -torch.inf
    case.target[:] = c - 1
    settings = {**FULL[name], "backend": backend}
    if name == "uskd":
        settings["beta"] = 0.0  # its soft labels give every class a share
    loss, gradients = loss_and_gradients(name, case, **settings)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    assert not gradients[0][:, : c // 2].any()


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_teacher_at_minus_infinity(name, backend):
    """0 * log 0 of a masked teacher gave NaN in a divergence; also where both are masked."""
    for both in (False, True):
        case = cast(make(name, 4, 33), torch.float32)
        case.target[:] = torch.tensor([0, 3, 32, 7])
        case.teachers[0][:, 20:30] = -torch.inf
        if both:
            for x in case.students:
                x[:, 20:30] = -torch.inf
        loss, gradients = loss_and_gradients(name, case, backend=backend, **FULL[name])
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


def test_both_masked_equals_the_classes_that_are_left(backend):
    """The log-target form of a divergence gave NaN for classes masked on both sides."""
    case = cast(make("kd", 4, 40), torch.float32)
    (z,), (t,) = case.students, case.teachers
    few = kdfuse.kd_loss(z[:, :30], t[:, :30], backend=backend)
    z[:, 30:] = t[:, 30:] = -torch.inf
    torch.testing.assert_close(kdfuse.kd_loss(z, t, backend=backend), few, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gap", (600.0, 1e4, 1e9))
@pytest.mark.parametrize("name", ("dkd", "nkd"))
def test_a_label_far_above_or_below_the_rest(name, backend, gap):
    """The log of an underflowed sum (or -1000 for a mask) gave inf and NaN from a gap of 600."""
    case = cast(make(name, 4, 33), torch.float32)
    rows = torch.arange(4)
    for sign in (1, -1):
        z, t = case.students[0].clone(), case.teachers[0].clone()
        z[rows, case.target] = sign * gap
        settings = {**FULL[name], "backend": backend}
        loss, (g,) = loss_and_gradients(name, Case([z], [t], case.target), **settings)
        assert loss.isfinite() and g.isfinite().all()
        # Beside such a label the rest keeps its precision.
        only = {"alpha": 0.0, "ce_weight": 0.0, "temperature": 4.0} if name == "dkd" else None
        if only:
            drop = F.one_hot(case.target, 33).bool()
            rest = [x[~drop].view(4, 32).double() / 4 for x in (z, t)]
            want = 16 * F.kl_div(
                rest[0].log_softmax(1), rest[1].log_softmax(1), log_target=True, reduction="none"
            )
            got = kdfuse.dkd_loss(z, t, case.target, beta=1.0, backend=backend, **only)
            assert got.item() == pytest.approx(want.sum(1).mean().item(), rel=1e-5)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled module")
@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_is_never_silently_zero(name):
    """A gradient stored in the forward pass is a constant: its own derivative came out as 0."""
    case = make(name, 4, 5)
    z = case.students[0].requires_grad_()
    for stored in (True, False):
        loss = call(name, case, **FULL[name], stored_gradient=stored)
        with pytest.raises(RuntimeError, match="no second derivative; .*backend='reference'"):
            torch.autograd.grad(loss.square(), z, create_graph=True)
    loss = call(name, case, backend="reference", **FULL[name])
    (g,) = torch.autograd.grad(loss, z, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), z)[0].abs().max() > 0


@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_was_changed_in_place_leaves_the_next_backward_as_it_was(name, stored):
    """The stored gradient itself was handed out: a second backward failed, or gave what was made
    of it."""
    case = make(name, 4, 9)
    students = [x.requires_grad_() for x in case.students]
    loss = call(name, case, stored_gradient=stored, **FULL[name])
    first = torch.autograd.grad(loss, students, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.data.mul_(0.5)
    again = torch.autograd.grad(loss, students, retain_graph=True)
    torch.testing.assert_close(again, tuple(kept), rtol=0, atol=0)
    again[0].mul_(2)
    torch.testing.assert_close(torch.autograd.grad(loss, students), tuple(kept), rtol=0, atol=0)


@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_scaled_by_their_own_upstream_gradient(name, backend, stored):
    """With reduction='none' the backward pass took the first row's factor for all rows."""
    case = make(name, 6, 33)
    settings = {**FULL[name], "backend": backend, "reduction": "none", "stored_gradient": stored}
    weights = torch.tensor([0.0, -1.0, 3.0, 1.0, 1e-3, 1e3], dtype=torch.float64)
    _, plain = loss_and_gradients(name, case, **settings)
    for upstream in (weights, weights.flip(0)[::1], weights[:1].expand(6)):
        _, scaled = loss_and_gradients(name, case, upstream, **settings)
        for g, of in zip(scaled, plain, strict=True):
            torch.testing.assert_close(g, of * upstream[:, None], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_leave_every_term(name, backend):
    """ignore_index reached cross-entropy alone, and the divergence counted padding rows."""
    case = make(name, 12, 33)
    case.target[::2] = -7
    few = Case(
        [x[1::2] for x in case.students], [x[1::2] for x in case.teachers], case.target[1::2]
    )
    more = {**FULL[name], "backend": backend, "ignore_index": -7, "return_terms": True}
    got, want = call(name, case, **more), call(name, few, **more)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("name", NAMES)
def test_all_rows_ignored(name, backend, reduction):
    """A mean over no row was 0 / 0."""
    case = cast(make(name, 4, 33), torch.bfloat16)
    case.target[:] = -100
    loss, gradients = loss_and_gradients(
        name, case, backend=backend, reduction=reduction, **FULL[name]
    )
    assert loss.item() == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_never_written(name, backend):
    """The gradient was written over the logits, which metrics and other losses still read."""
    case = cast(make(name, 9, 33), torch.float32)
    inputs = [*case.students, *case.teachers, case.target]
    copies = [x.clone() for x in inputs]
    versions = [x._version for x in inputs]
    loss_and_gradients(name, case, backend=backend, **FULL[name])
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert versions == [x._version for x in inputs]


@pytest.mark.parametrize("name", SCALED)
def test_t_squared_once(name, backend):
    """T^2 was forgotten, or applied twice."""
    (z, *slts), (t,), y = (lambda c: (c.students, c.teachers, c.target))(make(name, 9, 33))
    off = {"slkd": {"ce_weight": 0.0, "fused_ce_weight": 0.0}}
    case = Case([z, *slts], [t], y)
    with_square, without = (
        call(name, case, temperature=3.0, backend=backend, t_squared=s, **off.get(name, {}))
        for s in (True, False)
    )
    if name == "nkd":  # whose target part is at T = 1
        own = call(name, case, gamma=0.0, backend=backend)
        with_square, without = with_square - own, without - own
    torch.testing.assert_close(with_square, 9 * without, rtol=1e-12, atol=0)


def test_kd_is_batchmean_of_torch(backend):
    """A mean over rows and classes made the term C times too small."""
    case = make("kd", 9, 33)
    (z,), (t,) = case.students, case.teachers
    log_p, log_q = (z / 4).log_softmax(1), (t / 4).log_softmax(1)
    want = 16 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(kdfuse.kd_loss(z, t, backend=backend), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_wanted(name, backend):
    """Without requires_grad the loss came back as 0, or the call crashed."""
    case = cast(make(name, 9, 33), torch.float32)
    loss, terms = call(name, case, backend=backend, return_terms=True, **FULL[name])
    assert not loss.requires_grad
    students = [x.clone().requires_grad_() for x in case.students]
    wanted = call(name, Case(students, case.teachers, case.target), backend=backend, **FULL[name])
    assert torch.equal(loss, wanted.detach()) and wanted.requires_grad
    with torch.inference_mode():
        same = call(name, case, backend=backend, **FULL[name])
    assert torch.equal(same, loss)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_terms_in_float32(name, backend, dtype):
    """A loss in bfloat16 has three digits."""
    case = cast(make(name, 40, 33), dtype)
    wide = cast(case, torch.float32)
    got = call(name, case, backend=backend, return_terms=True, **FULL[name])
    want = call(name, wide, backend=backend, return_terms=True, **FULL[name])
    assert got[0].dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in got[1].values())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)  # these logits are exact in both


@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_one_hot_probabilities_are_labels(name, backend):
    case = make(name, 9, 33)
    soft = Case(case.students, case.teachers, F.one_hot(case.target, 33).double())
    torch.testing.assert_close(
        loss_and_gradients(name, soft, backend=backend, **FULL[name]),
        loss_and_gradients(name, case, backend=backend, **FULL[name]),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_probabilities_of_a_wider_type_than_the_logits(name, backend):
    """float64 from a collate function beside float32 or bfloat16 logits."""
    case = cast(make(name, 9, 33), torch.float32)
    wide = Case(case.students, case.teachers, probabilities(9, 33))
    narrow = Case(case.students, case.teachers, probabilities(9, 33).float())
    torch.testing.assert_close(
        loss_and_gradients(name, wide, backend=backend, **FULL[name]),
        loss_and_gradients(name, narrow, backend=backend, **FULL[name]),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_a_weight_of_zero_leaves_a_teacher_out(backend, value):
    """0 * NaN is NaN: a broken teacher that is switched off must not reach value or gradient."""
    case = cast(make("kd", 5, 33, teachers=2), torch.float32)
    alone = Case(case.students, case.teachers[:1], case.target)
    want = loss_and_gradients("kd", alone, backend=backend, **FULL["kd"])
    case.teachers[1][:] = value
    more = {**FULL["kd"], "backend": backend, "teacher_weights": [1.0, 0.0]}
    torch.testing.assert_close(loss_and_gradients("kd", case, **more), want, rtol=1e-6, atol=1e-7)
    off = {**FULL["kd"], "backend": backend, "kd_weight": 0.0}
    loss, (g,) = loss_and_gradients("kd", case, **off)
    assert loss.isfinite() and g.isfinite().all()


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("name", NO_TEACHER)
def test_a_teacher_without_weight_may_hold_anything(name, backend, value):
    case, settings = cast(make(name, 5, 33), torch.float32), {**FULL[name], **NO_TEACHER[name]}
    targets = [case.target, *([] if OPS[name].needs_target else [None])]
    for case.target in targets:
        more = {"ce_weight": 0.3 if case.target is not None else 0.0, "backend": backend}
        want = loss_and_gradients(name, case, **{**settings, **more})
        broken = Case(
            case.students, [torch.full_like(t, value) for t in case.teachers], case.target
        )
        got = loss_and_gradients(name, broken, **{**settings, **more})
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_the_others_of_dkd_do_not_see_a_teachers_label(backend, value):
    """With alpha=0 the divergence over the other classes is all that asks for the teacher."""
    case = cast(make("dkd", 5, 33), torch.float32)
    settings = {**FULL["dkd"], "alpha": 0.0, "backend": backend}
    want = loss_and_gradients("dkd", case, **settings)
    broken = case.teachers[0].scatter(1, case.target[:, None], value)
    got = loss_and_gradients("dkd", Case(case.students, [broken], case.target), **settings)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("name", [n for n in WITH_PROBABILITIES if not OPS[n].needs_target])
def test_class_probabilities_without_cross_entropy_may_hold_anything(name, backend, value):
    case = cast(make(name, 9, 33), torch.float32)
    case.target, settings = None, {**FULL[name], "ce_weight": 0.0, "backend": backend}
    want = loss_and_gradients(name, case, **settings)
    case.target = probabilities(9, 33).float()
    case.target[::2, 5] = value
    torch.testing.assert_close(
        loss_and_gradients(name, case, **settings), want, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("detach", (True, False))
def test_a_fusion_weight_of_zero_leaves_an_slt_out(backend, detach, value):
    case = cast(make("slkd", 5, 33, slts=2), torch.float32)
    case.students[2][:] = value
    case.students = [x.requires_grad_() for x in case.students]
    settings = {**FULL["slkd"], "fusion": [1.0, 0.0], "detach_slts": detach}
    settings.update(backend=backend, ce_weight=0.0, kd_weight=0.0)
    loss = call("slkd", case, **settings)
    loss.backward()
    assert loss.isfinite() and case.students[0].grad.isfinite().all()
    assert detach or case.students[1].grad.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("kd", "dkd", "nkd", "tf_nkd"))
def test_masks_with_the_lowest_number(name, backend, dtype):
    """Classes masked with finfo.min instead of -inf: all but the label, or all but a few."""
    for left in (1, 4):
        case = cast(make(name, 6, 33), dtype)
        case.target[:] = torch.arange(6) % left
        lowest = torch.finfo(dtype).min / 8  # a difference of two is a number as well
        for x in (*case.students, *case.teachers):
            x[:, left:] = lowest
        loss, gradients = loss_and_gradients(name, case, backend=backend, **FULL[name])
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("size", (1e6, 1e12, 1e30))
@pytest.mark.parametrize("name", ("kd", "tf_nkd", "slkd"))
def test_enormous_logits(name, backend, size):
    """A row around 1e12: its ratios still decide, and equal logits are a uniform row."""
    case = cast(make(name, 4, 33), torch.float32)
    for x in (*case.students, *case.teachers):
        x[:] = size
    loss, gradients = loss_and_gradients(name, case, backend=backend, **FULL[name])
    for x in (*case.students, *case.teachers):
        x[:] = 0.0
    want, of_want = loss_and_gradients(name, case, backend=backend, **FULL[name])
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients, of_want, rtol=1e-5, atol=1e-6)


def test_denominator_stays_a_tensor(backend):
    """Gradient accumulation divides by the samples of all micro-batches, a number on the device."""
    case = cast(make("kd", 8, 33), torch.float32)
    whole, (g,) = loss_and_gradients("kd", case, backend=backend, **FULL["kd"])
    total, gradients = 0, []
    for part in (slice(0, 3), slice(3, 8)):
        few = Case([x[part] for x in case.students], [x[part] for x in case.teachers], None)
        few.target = case.target[part]
        settings = {**FULL["kd"], "backend": backend, "denominator": torch.tensor(8)}
        loss, (of_part,) = loss_and_gradients("kd", few, **settings)
        total += loss
        gradients.append(of_part)
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(gradients), g, rtol=1e-6, atol=1e-9)


def test_the_first_class_is_a_class_like_any_other(backend):
    """A default padding index of 0 dropped class 0."""
    z = torch.zeros(2, 3)
    loss = kdfuse.kd_loss(z, z, torch.zeros(2, dtype=torch.int64), ce_weight=1.0, backend=backend)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)
