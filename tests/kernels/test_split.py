"""Losses of parts of the classes in one process: each part in turn, their exchange held back until
all have packed. test_split_ranks.py has real processes.
"""

import re
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from calls import (
    FULL,
    IN_PARTS,
    NO_TEACHER,
    WITH_TEACHER,
    Case,
    call,
    cast,
    compare,
    loss_type,
    make,
    params_of,
    truth,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import kdfuse
from kdfuse.kernels import backends
from kdfuse.kernels.sharded import call as split
from kdfuse.kernels.sharded.merge import layout, merge
from kdfuse.kernels.table import OPS

BACKENDS = [name for name in ("reference", "cpu") if not backends.backends()[name]]
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CUTS = (0, 5, 6, 22, 33)  # parts of five classes, one, a full vector, an odd few
INF = float("inf")
FEW = settings(deadline=None, max_examples=25, derandomize=True, database=None)


class Packed(Exception):
    """A part's statistics, caught on their way to the others."""


def part_of(case: Case, begin: int, end: int) -> Case:
    students = [x[:, begin:end] for x in case.students]
    return Case(students, [x[:, begin:end] for x in case.teachers], case.target)


def one_part(name, case, begin, end, **settings):
    """The loss of one part; its logits are leaves, returned beside it."""
    classes = case.students[0].shape[1]
    part = part_of(case, begin, end)
    leaves = [x.detach().clone().requires_grad_() for x in part.students]
    student = kdfuse.ClassPart(leaves[0], begin, classes)
    return call(name, Case([student, *leaves[1:]], part.teachers, case.target), **settings), leaves


@contextmanager
def exchange(gather):
    with mock.patch.object(split, "gather", gather):
        yield


def pack(name, case, cuts, **settings):
    """(W, N, S): the statistics that each part would send."""
    sent = []

    def keep(packed, group):
        sent.append(packed)
        raise Packed

    with exchange(keep):
        for begin, end in zip(cuts, cuts[1:], strict=False):
            with pytest.raises(Packed):
                one_part(name, case, begin, end, **settings)
    return torch.stack(sent)


def statistics(name, case, cuts, **settings):
    """Without what else is sent: the parts' first classes."""
    return pack(name, case, cuts, **settings)[..., :-1]


def in_parts(name, case, cuts, upstream=None, **settings):
    """What each part returns, and the gradients of all parts side by side."""
    sent = pack(name, case, cuts, **settings)
    results, made = [], []
    with exchange(lambda packed, group: sent):
        for begin, end in zip(cuts, cuts[1:], strict=False):
            result, leaves = one_part(name, case, begin, end, **settings)
            loss = result[0] if isinstance(result, tuple) else result
            weight = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
            made.append(torch.autograd.grad(loss, leaves, weight))
            detached = (loss.detach(), result[1]) if isinstance(result, tuple) else loss.detach()
            results.append(detached)
    return results, [torch.cat(gs, 1) for gs in zip(*made, strict=True)]


def check(name, case, cuts, *, backend, **settings):
    """Each row's loss, the same in every part, and the joined gradients, against the oracle."""
    choices = torch.tensor([-2.0, -0.5, 0.0, 0.25, 1.0, 4.0], dtype=torch.float64)
    upstream = choices[torch.arange(len(case.students[0])) % len(choices)]
    losses, gradients = in_parts(
        name, case, cuts, upstream, reduction="none", backend=backend, **settings
    )
    assert all(torch.equal(losses[0], x) for x in losses[1:]) or losses[0].isnan().any()
    assert losses[0].dtype == loss_type(*(x.dtype for x in (*case.students, *case.teachers)))
    settings.pop("stored_gradient", None)
    compare(name, case, upstream, losses[0], gradients, **settings)


@pytest.fixture(params=backends.compiled()[0].levels() if "cpu" in BACKENDS else [])
def level(request):
    module = backends.compiled()[0]
    before = module.level()
    module.set_level(request.param)
    yield request.param
    module.set_level(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", IN_PARTS)
def test_against_the_formulas(name, dtype, backend):
    check(name, cast(make(name, 40, 33), dtype), CUTS, backend=backend, **FULL[name])


@pytest.mark.parametrize("name", IN_PARTS)
def test_every_simd_level(name, level):
    case = cast(make(name, 40, 1001), torch.float32)
    check(name, case, (0, 400, 401, 1001), backend="cpu", **FULL[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 20.0])
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_temperatures(name, temperature, backend):
    settings = {**FULL[name], "temperature": temperature}
    check(name, cast(make(name, 20, 33), torch.float32), CUTS, backend=backend, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", IN_PARTS)
def test_the_gradient_made_in_the_backward_pass(name, backend):
    case = cast(make(name, 20, 33), torch.float32)
    check(name, case, CUTS, backend=backend, stored_gradient=False, **FULL[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_teachers_one_of_weight_zero_with_nan(backend):
    case = cast(make("kd", 20, 33, teachers=3), torch.float32, torch.bfloat16)
    settings = {**FULL["kd"], "teacher_weights": [0.5, 0.25, 0.0]}
    true = truth("kd", case, **settings)
    case.teachers[2][:] = float("nan")
    (loss, *_), (gradient,) = in_parts(
        "kd", case, CUTS, reduction="none", backend=backend, **settings
    )
    np.testing.assert_allclose(loss.detach(), true.loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, true.gradients[0], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NO_TEACHER)
def test_a_teacher_without_weight_may_hold_anything(name, backend):
    case = cast(make(name, 5, 33), torch.float32)
    more = {**FULL[name], **NO_TEACHER[name], "backend": backend}
    want = in_parts(name, case, CUTS, **more)
    for value in (torch.nan, INF, -INF):
        case.teachers = [torch.full_like(t, value) for t in case.teachers]
        got = in_parts(name, case, CUTS, **more)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_others_of_dkd_do_not_see_a_teachers_label(backend):
    case = cast(make("dkd", 5, 33), torch.float32)
    more = {**FULL["dkd"], "alpha": 0.0, "backend": backend}
    want = in_parts("dkd", case, CUTS, **more)
    for value in (torch.nan, INF, -INF):
        case.teachers[0].scatter_(1, case.target[:, None], value)
        torch.testing.assert_close(in_parts("dkd", case, CUTS, **more), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kd_without_a_target(backend):
    case = cast(make("kd", 20, 33), torch.float32)
    case.target = None
    check("kd", case, CUTS, backend=backend, temperature=3.0)
    results, _ = in_parts("kd", case, CUTS, return_terms=True, backend=backend)
    assert set(results[0][1]) == {"kd", "rows"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", IN_PARTS)
def test_ignored_rows_hold_anything(name, backend):
    case = cast(make(name, 20, 33), torch.float32)
    case.target[[3, 7]] = -100
    true = truth(name, case, **FULL[name])
    for x in (*case.students, *case.teachers):
        x[3] = float("nan")
    results, gradients = in_parts(
        name, case, CUTS, backend=backend, return_terms=True, **FULL[name]
    )
    loss, terms = results[0]
    assert terms["rows"] == 18
    assert loss.item() == pytest.approx(true.loss.sum() / 18, rel=1e-5)
    for g, t in zip(gradients, true.gradients, strict=True):
        assert not g[[3, 7]].any()
        np.testing.assert_allclose(g, t / 18, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", IN_PARTS)
def test_large_logits_keep_their_precision(name, dtype, backend):
    near = cast(make(name, 20, 33), dtype)
    # Exact sums, another offset for each set, so that the loss has to be the same.
    far = Case(
        [x.float() + 8192 * (k + 1) for k, x in enumerate(near.students)],
        [x.float() - 8192 for x in near.teachers],
        near.target,
    )
    near = cast(near, torch.float32)
    (loss, *_), gradients = in_parts(name, near, CUTS, backend=backend, **FULL[name])
    (moved, *_), of_moved = in_parts(name, far, CUTS, backend=backend, **FULL[name])
    # The reference fuses the SL-Ts as they stand, each rounded at its own height.
    loose = 1e-4 if name == "slkd" and backend == "reference" else 2e-6
    assert moved.item() == pytest.approx(loss.item(), rel=loose)
    for g, h in zip(gradients, of_moved, strict=True):
        torch.testing.assert_close(g, h, rtol=0, atol=loose * g.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", IN_PARTS)
def test_a_part_of_minus_infinity_alone(name, backend):
    case = cast(make(name, 20, 33), torch.float32)
    for x in (*case.students, *case.teachers):
        x[:, 6:22] = -INF
    case.target[:] = torch.arange(20) % 6
    case.target[5:] += 22 - 6 + 6
    case.target.clamp_(max=32)
    check(name, case, CUTS, backend=backend, **FULL[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_teacher_mass_where_the_student_has_none(name, backend):
    """Infinite as a whole, whichever part it is in; the gradient stays finite where it is."""
    case = cast(make(name, 20, 33), torch.float32)
    case.students[0][4, 6:22] = -INF
    case.target[4] = 30
    check(name, case, CUTS, backend=backend, **{**FULL[name], "ce_weight": 0.0})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("kd", "dkd", "tf_nkd", "nkd"))
def test_only_the_label_is_finite(name, backend):
    case = cast(make(name, 20, 33), torch.float32)
    for x in (*case.students, *case.teachers):
        kept = x[9, case.target[9]].clone()
        x[9] = -INF
        x[9, case.target[9]] = kept
    keep = {"dkd": {"beta": 0.0}, "nkd": {"gamma": 0.0}}.get(name, {})
    check(name, case, CUTS, backend=backend, **{**FULL[name], **keep})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_nan_and_infinity_in_one_part_reach_all(name, value, backend):
    case = cast(make(name, 20, 33), torch.float32)
    case.target[[5, 7]] = 30
    case.students[0][5, 2] = value
    case.teachers[0][7, 2] = value
    check(name, case, CUTS, backend=backend, **FULL[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ("kd", "dkd"))
def test_student_equal_to_teacher_is_exactly_zero(name, dtype, backend):
    case = cast(make(name, 20, 33), dtype)
    case.teachers = [case.students[0].clone()]
    losses, (gradient,) = in_parts(name, case, CUTS, backend=backend, reduction="none")
    assert all(not loss.any() for loss in losses)
    assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", IN_PARTS)
def test_terms_and_reductions_are_those_of_the_whole(name, backend):
    case = cast(make(name, 30, 33), torch.float32)
    case.target[2] = -100
    for way in (
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"denominator": 7.0},
        {"denominator": torch.tensor(7.0)},
    ):
        keep = {**FULL[name], **way, "return_terms": True, "backend": backend}
        loss, terms = call(name, case, **keep)
        results, gradients = in_parts(name, case, CUTS, **keep)
        leaves = [x.clone().requires_grad_() for x in case.students]
        whole = call(name, Case(leaves, case.teachers, case.target), **keep)[0]
        expected = torch.autograd.grad(whole.sum(), leaves)
        for own, own_terms in results:
            torch.testing.assert_close(own, loss)
            assert list(own_terms) == list(terms)
            torch.testing.assert_close(own_terms, terms)
        for g, h in zip(gradients, expected, strict=True):
            torch.testing.assert_close(g, h)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(data=st.data())
def test_ranks_with_ties_and_nan(backend, data):
    """top1 and top5 of logits that take few values: ties go to the lower class, NaN ahead."""
    classes = data.draw(st.integers(2, 14))
    entries = st.sampled_from([0.0, 1.0, 2.0, -INF, INF, float("nan")])
    row = data.draw(st.lists(entries, min_size=classes, max_size=classes))
    cuts = sorted({0, classes, *data.draw(st.lists(st.integers(1, classes - 1), max_size=4))})
    student = torch.tensor(row).repeat(classes, 1)
    case = Case([student], [torch.zeros_like(student)], torch.arange(classes))
    expected = [int(x) for x in truth("kd", case).terms["top1"]]
    of_five = [int(x) for x in truth("kd", case).terms["top5"]]
    for y in range(classes):
        one = Case([student[:1]], [torch.zeros(1, classes)], torch.tensor([y]))
        results, _ = in_parts("kd", one, cuts, return_terms=True, backend=backend)
        for _, terms in results:
            assert (int(terms["top1"]), int(terms["top5"])) == (expected[y], of_five[y])


@st.composite
def partitions(draw, classes=33):
    return sorted({0, classes, *draw(st.lists(st.integers(1, classes - 1), max_size=6))})


def same_statistics(got, expected):
    torch.testing.assert_close(got, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("first", ((0, 0), (0, 3), (1, 5), (0, 5)))
def test_parts_that_do_not_hold_every_class_once_are_named(first):
    """Their sizes add up to all classes: an offset was left out or miscounted."""
    part = kdfuse.ClassPart(torch.zeros(2, 7), 0, 11)
    size = torch.tensor([[4.0, 4.0], [7.0, 7.0]])
    split.check_parts(torch.tensor([[0.0, 0.0], [4.0, 4.0]]), size, part)
    split.check_parts(torch.tensor([[7.0, 7.0], [0.0, 0.0]]), size, part)
    with pytest.raises(ValueError, match=r"hold the classes \[.*first_class"):
        split.check_parts(torch.tensor(first)[:, None].double().repeat(1, 2), size, part)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", IN_PARTS)
@FEW
@given(cuts=partitions(), seed=st.integers(0, 99))
def test_merging_the_parts_gives_the_statistics_of_the_whole(name, backend, cuts, seed):
    case = cast(make(name, 5, 33, seed=seed), torch.float32)
    case.students[0][3, :12] = -INF
    case.students[0][4] += 5000
    keep = {**FULL[name], "backend": backend}
    at = layout_of(name, case, keep)
    parts, whole = statistics(name, case, cuts, **keep), statistics(name, case, (0, 33), **keep)
    same_statistics(merge(parts, at), whole[0])
    k = len(parts) // 2
    if k:  # some of the parts, then all
        halves = torch.stack([merge(parts[:k], at), merge(parts[k:], at)])
        same_statistics(halves, statistics(name, case, (0, cuts[k], 33), **keep))
        same_statistics(merge(halves, at), whole[0])


def layout_of(name, case, settings):
    found = []

    def keep(op, students, teachers, params):
        found.append(layout(op, students, teachers, params))
        raise Packed

    with mock.patch.object(split, "layout", keep), pytest.raises(Packed):
        one_part(name, case, 0, case.students[0].shape[1], **settings)
    return found[0]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled module")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", IN_PARTS)
def test_compiled_and_plain_statistics_are_the_same(name, dtype):
    case = cast(make(name, 20, 33, seed=3), dtype)
    case.target[4] = -100
    case.students[0][5, 6:22] = -INF
    plain = statistics(name, case, CUTS, backend="reference", **FULL[name])
    same_statistics(statistics(name, case, CUTS, backend="cpu", **FULL[name]), plain)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled module")
@pytest.mark.parametrize("name", IN_PARTS)
def test_opcheck(name):
    case = part_of(cast(make(name, 6, 33), torch.bfloat16), 6, 22)
    params = params_of(name)
    stats, grad = split.passes(OPS[name], "cpu")
    given = (case.students, case.teachers, case.target, 6, 33)
    torch.library.opcheck(stats, (*given, params, -100))
    packed = stats(*given, params, -100)
    at = layout(OPS[name], len(case.students), len(case.teachers), params)
    alone = merge(packed[None], at)
    for wanted in (False, True):
        torch.library.opcheck(grad, (*given, alone, None, None, params, 1, -100, wanted))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", IN_PARTS)
def test_a_part_without_classes_and_a_batch_without_rows(name, backend):
    case = cast(make(name, 20, 33), torch.float32)
    check(name, case, (0, 0, 20, 20, 33, 33), backend=backend, **FULL[name])
    none = Case([x[:0] for x in case.students], [x[:0] for x in case.teachers], case.target[:0])
    (loss, *_), gradients = in_parts(name, none, CUTS, backend=backend, **FULL[name])
    assert loss == 0 and all(g.shape == (0, 33) for g in gradients)


def test_one_process_that_holds_all_classes():
    case = cast(make("kd", 20, 33), torch.float32)
    whole = kdfuse.ClassPart(case.students[0], 0, 33)
    alone = kdfuse.kd_loss(whole, case.teachers, case.target, ce_weight=0.5)
    torch.testing.assert_close(
        alone, kdfuse.kd_loss(case.students[0], case.teachers, case.target, ce_weight=0.5)
    )
    with torch.no_grad():
        assert not kdfuse.KDLoss(ce_weight=0.5)(whole, case.teachers, case.target).requires_grad


def test_a_second_derivative_is_refused():
    z = torch.randn(4, 8, requires_grad=True)
    loss = kdfuse.kd_loss(kdfuse.ClassPart(z, 0, 8), torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


Z = torch.zeros(4, 6)
Y = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kind", "message", "run"),
    [
        (
            ValueError,
            "uskd_loss ranks all classes of a row",
            lambda: kdfuse.uskd_loss(kdfuse.ClassPart(Z, 0, 6), Z, Y),
        ),
        (
            ValueError,
            "the parts of this group hold the classes ",
            lambda: kdfuse.kd_loss(kdfuse.ClassPart(Z, 0, 12), Z),
        ),
        (
            ValueError,
            "ClassPart of 6 classes from first_class=4 on is not within classes=8",
            lambda: kdfuse.kd_loss(kdfuse.ClassPart(Z, 4, 8), Z),
        ),
        (
            ValueError,
            "teacher must have the shape (4, 6)",
            lambda: kdfuse.kd_loss(kdfuse.ClassPart(Z, 0, 6), torch.zeros(4, 12)),
        ),
        (
            TypeError,
            "every SL-T must be this process's part of the logits as a tensor, got ClassPart",
            lambda: kdfuse.slkd_loss(
                kdfuse.ClassPart(Z, 0, 6), Z, [kdfuse.ClassPart(Z, 0, 6)] * 2, Y
            ),
        ),
        (
            ValueError,
            "target of a ClassPart must be int64 class indices of shape (4,), got torch.float32",
            lambda: kdfuse.kd_loss(kdfuse.ClassPart(Z, 0, 6), Z, torch.zeros(4, 6)),
        ),
        (
            ValueError,
            "target[0] is 9, outside the 6 classes",
            lambda: kdfuse.kd_loss(kdfuse.ClassPart(Z, 0, 6), Z, Y + 9),
        ),
        (
            TypeError,
            "target must be a tensor, got NoneType",
            lambda: kdfuse.dkd_loss(kdfuse.ClassPart(Z, 0, 6), Z, None),
        ),
        (
            ValueError,
            "classes=2 leaves dkd_loss a single class beside the label",
            lambda: kdfuse.dkd_loss(kdfuse.ClassPart(Z[:, :1], 0, 2), Z[:, :1], Y),
        ),
        (
            ValueError,
            "teacher requires grad",
            lambda: kdfuse.kd_loss(kdfuse.ClassPart(Z, 0, 6), torch.zeros(4, 6).requires_grad_()),
        ),
        (
            ValueError,
            "backend='triton' has no kernels for a ClassPart",
            lambda: kdfuse.kd_loss(kdfuse.ClassPart(Z, 0, 6), Z, backend="triton"),
        ),
        (
            TypeError,
            "a ClassPart takes its teachers as parts of whole logits, got a SparseTeacher",
            lambda: kdfuse.kd_loss(
                kdfuse.ClassPart(Z, 0, 6), kdfuse.SparseTeacher.top_k(Z, 2, temperature=4.0)
            ),
        ),
        (
            ValueError,
            "student must be floating logits of shape (N, C_part), got torch.int64",
            lambda: kdfuse.kd_loss(kdfuse.ClassPart(Z.long(), 0, 6), Z),
        ),
        (
            ValueError,
            "denominator goes with reduction='mean'",
            lambda: kdfuse.kd_loss(kdfuse.ClassPart(Z, 0, 6), Z, reduction="sum", denominator=2.0),
        ),
    ],
)
def test_refusals(kind, message, run):
    with pytest.raises(kind, match=re.escape(message)):
        run()
