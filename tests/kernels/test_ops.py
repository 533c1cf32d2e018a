"""Every loss of the table on every backend, against formulas in float64 (see oracle.py, calls.py).

One thing varies at a time around 70 rows of 33 classes: two full vectors of the widest SIMD level
and one class more, rows enough for two threads' tasks to differ.
"""

import numpy as np
import pytest
import torch
from calls import (
    FULL,
    NAMES,
    PAIR,
    WITH_PROBABILITIES,
    WITH_TEACHER,
    Case,
    call,
    cast,
    check,
    loss_and_gradients,
    make,
    probabilities,
    truth,
    with_switch,
)

from kdfuse.kernels import backends
from kdfuse.kernels.table import OPS

BACKENDS = [name for name in ("reference", "cpu") if not backends.backends()[name]]
INF = float("inf")

# Classes: the smallest two; around the vector lengths 4, 8 and 16, alone and doubled; two common
# data sets, and one class more than a multiple of every length.
SHAPES = [(70, c) for c in (2, 3, 5, 16, 17, 31, 33, 100, 1000, 1001)]
# Rows: none, one, an odd few, more than one task a thread; then 21841 classes, many blocks of sums.
SHAPES += [(0, 33), (1, 33), (3, 1001), (4096, 33), (5, 21841)]


def settings_for(name, c):
    return {**FULL[name], **(PAIR.get(name, {}) if c == 2 else {})}


@pytest.fixture(params=[None] if "cpu" not in BACKENDS else backends.compiled()[0].levels())
def level(request):
    """Each SIMD level that this machine runs."""
    module = backends.compiled()[0]
    if module is None:
        pytest.skip("no compiled module")
    before = module.level()
    module.set_level(request.param)
    yield request.param
    module.set_level(before)


def test_table_is_what_the_tests_call():
    assert set(OPS) == set(NAMES)


@pytest.mark.parametrize("n, c", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, backend, n, c):
    if name == "uskd" and (n, c) == (5, 21841):
        n = 1  # the oracle's ranking is a Python sort
    check(name, cast(make(name, n, c), torch.float32), backend=backend, **settings_for(name, c))


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0, 3.0, 4.0, 7.5, 20.0))
@pytest.mark.parametrize("on", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_temperatures(name, backend, temperature, on):
    # 1, 2 and 4 take the short ways to softmax at T = 1; the others an exponential of its own.
    settings = {**FULL[name], "temperature": temperature, **with_switch(name, on)}
    check(name, cast(make(name, 70, 100), torch.float32), backend=backend, **settings)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_types(name, backend, dtype, stored):
    case = cast(make(name, 70, 33), dtype)
    check(name, case, backend=backend, stored_gradient=stored, **FULL[name])


@pytest.mark.parametrize(
    "student, teacher",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_mixed_types(name, backend, student, teacher):
    check(name, cast(make(name, 70, 33), student, teacher), backend=backend, **FULL[name])


@pytest.mark.parametrize("c", (3, 16, 17, 100, 1001))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_simd_levels(name, level, dtype, c):
    if name == "uskd" and c == 1001:
        c = 257  # as many classes as bfloat16 tells apart
    check(name, cast(make(name, 33, c), dtype), backend="cpu", **settings_for(name, c))


@pytest.mark.parametrize("count", (1, 2, 3, 5))
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_teachers(backend, count):
    case = cast(make("kd", 70, 33, teachers=count), torch.float32)
    weights = [0.0 if k == 1 else 1.0 / (k + 1) for k in range(count)]
    check("kd", case, backend=backend, **FULL["kd"])
    check("kd", case, backend=backend, teacher_weights=weights, **FULL["kd"])


@pytest.mark.parametrize("count", (1, 2, 3, 5))
@pytest.mark.parametrize("detach", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_slts(backend, detach, count):
    case = cast(make("slkd", 70, 33, slts=count), torch.float32)
    fusion = [(k + 1) * 2 / (count * (count + 1)) for k in range(count)]
    settings = {**FULL["slkd"], "fusion": fusion, "detach_slts": detach}
    check("slkd", case, backend=backend, **settings)
    check("slkd", case, backend=backend, **{**settings, "fusion": None})


@pytest.mark.parametrize("rank", ("released", "paper"))
@pytest.mark.parametrize("c", (3, 33, 1000))
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks(backend, c, rank):
    # float64: keys of random logits stand apart by more than its rounding.
    random = np.random.default_rng(0)
    z, w = (torch.from_numpy(random.normal(0, spread, (70, c))) for spread in (2.0, 1.5))
    case = Case([z, w], [], make("uskd", 70, c).target)
    check("uskd", case, backend=backend, **{**FULL["uskd"], "rank": rank})


# What is done to the logits of students, teachers or both before a call.
def leading(x):
    x[:, :20] = -INF  # a whole vector of every level


def some(x):
    x[:, [0, 5, 32]] = -INF


def all_but_two(x):
    x[::2, 2:] = -INF


def saturated(x):
    x[:] = torch.sign(x) * 1e4


def shifted(x):
    x += 1e4


def constant(x):
    x[:] = 3.0


def ties(x):
    x[:, ::2] = x[:, 1:2]


PATTERNS = (leading, some, saturated, shifted, constant, ties, all_but_two)


HARD = [
    (name, p, who) for name in NAMES for p in PATTERNS for who in ("student", "teacher", "both")
]
WHO = ("student", "teacher", "both")
HARD = [(name, p, who) for name in NAMES for p in PATTERNS for who in WHO]
HARD = [(name, p, who) for name, p, who in HARD if name in WITH_TEACHER or who == "student"]
# Equal rank keys: their order would be the type's.
HARD = [(name, p, who) for name, p, who in HARD if name != "uskd" or p in (shifted, leading)]


@pytest.mark.parametrize("name, pattern, who", HARD)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_logits(name, backend, dtype, pattern, who):
    case = make(name, 24, 33)
    case.target[2:8] = torch.tensor([0, 32, 5, 19, 20, 1])
    for x in (case.students if who != "teacher" else []) + (
        case.teachers if who != "student" else []
    ):
        pattern(x)
    check(name, cast(case, dtype), backend=backend, **FULL[name])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_class_probabilities(name, backend, dtype):
    case = cast(make(name, 70, 33), dtype)
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        case.target = probabilities(70, 33).to(kind)
        check(name, case, backend=backend, **FULL[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_equal_probabilities_take_the_lower_class(name, backend):
    # Cutting two images in half is no rare event: the label must not depend on the sort.
    case = cast(make(name, 40, 33), torch.float32)
    soft = torch.zeros(40, 33)
    for i in range(40):
        soft[i, [i % 32, 32]] = 0.5
    soft[0] = 1 / 33
    case.target = soft
    if name == "uskd":  # the whole row stands in the first rank otherwise
        case.target[0] = case.target[1]
    check(name, case, backend=backend, **FULL[name])


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("ignored", ("none", "some", "all"))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_reductions_and_terms(name, backend, ignored, reduction):
    case = make(name, 70, 33)
    if ignored == "all":
        case.target[:] = -100
    elif ignored == "some":
        case.target[::3] = -100
        for x in (*case.students, *case.teachers):
            x[::3] = float("nan")  # a row that does not count may hold anything
    students = [x.requires_grad_() for x in case.students]
    settings = {**FULL[name], "backend": backend, "reduction": reduction, "return_terms": True}
    loss, terms = call(name, case, **settings)
    assert loss.shape == () and not any(v.requires_grad for v in terms.values())
    gradients = torch.autograd.grad(loss, students)
    true = truth(name, case, **FULL[name])
    valid = (case.target != -100).sum().item()
    divisor = max(valid, 1) if reduction == "mean" else 1
    assert loss.item() == pytest.approx(true.loss.sum() / divisor, rel=1e-13, abs=1e-13)
    for g, of_row in zip(gradients, true.gradients, strict=True):
        np.testing.assert_allclose(g.numpy(), of_row / divisor, rtol=1e-12, atol=1e-13)
        assert not g[case.target == -100].any()
    assert set(terms) == set(true.terms) | {"rows"} and terms["rows"].item() == valid
    for key, v in true.terms.items():
        mean = v.sum() / (1 if "top" in key else max(valid, 1))
        assert terms[key].shape == () and terms[key].item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_denominator(name, backend):
    case = cast(make(name, 10, 33), torch.float32)
    total, of_total = loss_and_gradients(name, case, reduction="sum", backend=backend, **FULL[name])
    for denominator in (4, 4.0, torch.tensor(4), torch.tensor(4.0, dtype=torch.float64)):
        settings = {**FULL[name], "backend": backend, "denominator": denominator}
        loss, gradients = loss_and_gradients(name, case, **settings)
        torch.testing.assert_close(loss, total / 4, rtol=1e-6, atol=0)
        for g, of in zip(gradients, of_total, strict=True):
            torch.testing.assert_close(g, of / 4, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name, backend):
    """Columns of a wider tensor, one row for all, transposed, columns apart: as their copies."""
    n, c = 9, 33
    case = cast(make(name, n, c), torch.float32)
    target = torch.stack([case.target, case.target + 1], 1)[:, 0]

    def wider(x):
        return torch.cat([x[:, :2], x, x], 1)[:, 2 : c + 2]

    def spread(x):
        return x.repeat_interleave(3, 1)[:, ::3]

    layouts = (wider, spread, lambda x: x.T.contiguous().T, lambda x: x[:1].expand(n, c))
    for layout in layouts:
        students, teachers = [layout(x) for x in case.students], [layout(x) for x in case.teachers]
        copies = Case([x.clone() for x in students], [x.clone() for x in teachers], case.target)
        settings = {**FULL[name], "backend": backend}
        expected = loss_and_gradients(name, copies, **settings)
        got = loss_and_gradients(name, Case(students, teachers, target), **settings)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_further_apart_than_32_bits(name):
    """Two rows, 2^31 elements apart; what lies between is never touched, and takes no memory."""
    case = cast(make(name, 2, 33), torch.bfloat16)
    apart = 2**31 + 64

    def far(x):
        room = torch.empty(apart + 64, dtype=x.dtype).as_strided((2, 33), (apart, 1))
        return room.copy_(x)

    expected = loss_and_gradients(name, case, **FULL[name])
    moved = Case([far(x) for x in case.students], case.teachers, case.target)
    torch.testing.assert_close(loss_and_gradients(name, moved, **FULL[name]), expected)
    if case.teachers:
        moved = Case(case.students, [far(x) for x in case.teachers], case.target)
        torch.testing.assert_close(loss_and_gradients(name, moved, **FULL[name]), expected)


@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_second_use_and_second_backward(name, backend, stored):
    """The logits also feed another loss; two backward calls give the same gradients."""
    case = cast(make(name, 12, 33), torch.float32)
    leaf = case.students[0].requires_grad_()
    z = leaf * 1.0
    copy = z.detach().clone()
    settings = {**FULL[name], "backend": backend, "stored_gradient": stored}
    loss = call(name, Case([z, *case.students[1:]], case.teachers, case.target), **settings)
    (alone,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    total = 3 * loss + z.square().sum()
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(total, leaf)
    assert torch.equal(first, second) and torch.equal(z, copy)
    torch.testing.assert_close(first, 3 * alone + 2 * copy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_gradient_is_never_used_again(name, stored):
    """Clipped in place between two backward calls: an error, or the right gradient."""
    case = cast(make(name, 12, 33), torch.float32)
    z = case.students[0].requires_grad_()
    loss = call(name, case, **FULL[name], stored_gradient=stored)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    first.zero_()
    try:
        (second,) = torch.autograd.grad(loss, z)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(second, kept)


@pytest.mark.parametrize("name", NAMES)
def test_accumulating_twice_through_backward(name):
    case = cast(make(name, 12, 33), torch.float32)
    z = case.students[0].requires_grad_()
    loss = call(name, case, **FULL[name])
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    z.grad.zero_()
    loss.backward(retain_graph=True)
    assert torch.equal(z.grad, once)
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * once, rtol=0, atol=0)
