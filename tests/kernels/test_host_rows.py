"""The CUDA row pass, run on the host by teams of one and of several threads, against the CPU ops.

It shows that the arithmetic of csrc/*_cuda.h and its division among threads are right; the kernels
themselves, their launches and the 16-byte stores of a real device are for test_gpu.py.
"""

import host_rows
import pytest
import torch
from calls import FULL, NAMES, PAIR, WITH_PROBABILITIES, Case, cast, make, probabilities

import kdfuse
from kdfuse.kernels import backends

INF = float("inf")
pytestmark = [
    pytest.mark.slow(20),
    pytest.mark.skipif(
        backends.compiled()[0] is None,
        reason=f"no CPU ops to compare with: {backends.compiled()[1]}",
    ),
]


def settings_for(name, c, **more):
    return {**FULL[name], **(PAIR.get(name, {}) if c == 2 else {}), **more}


def check(library, monkeypatch, name, case, settings, *, upstream=None, reduction=0, **team):
    students, teachers, target, params = host_rows.arguments(monkeypatch, name, case, **settings)
    if upstream is not None:
        upstream = upstream.to(torch.float64)
    divisor = torch.tensor(7.5, dtype=torch.float64) if reduction == 1 else None
    op = getattr(torch.ops.kdfuse, name).default
    true = op(students, teachers, [], [], target, divisor, upstream, params, reduction, -100, True)
    got = host_rows.run(
        library,
        name,
        students,
        teachers,
        target,
        params,
        reduction=reduction,
        denominator=divisor,
        upstream=upstream,
        **team,
    )
    wide = torch.float64 in [x.dtype for x in (*students, *teachers)]
    for what, a, b in (("loss", got[0], true[0]), ("terms", got[1], true[1])):
        near(a, b, f"{name} {what}", 1e-12 if wide else 3e-5, 1e-12 if wide else 1e-5)
    assert len(got[2]) == len(true[2])
    # Differences of logits carry the rounding of the logits.
    largest = max(x[x.isfinite()].abs().max().item() for x in (*students, *teachers))
    for k, (a, b) in enumerate(zip(got[2], true[2], strict=True)):
        step = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-3}[a.dtype]
        near(
            a.double(),
            b.double(),
            f"{name} gradient {k}",
            step,
            1e-12 if wide else 1e-6 + 1e-7 * largest,
        )


def near(a, b, what, relative, absolute):
    torch.testing.assert_close(
        a, b, rtol=relative, atol=absolute, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("c", (2, 3, 7, 8, 9, 31, 33, 100, 1001))
@pytest.mark.parametrize("name", NAMES)
def test_shapes(library, monkeypatch, name, c, dtype):
    case = cast(make(name, 9, c, seed=c), dtype)
    check(library, monkeypatch, name, case, settings_for(name, c))


@pytest.mark.parametrize("held", (0, 1, 8))
@pytest.mark.parametrize("threads", (2, 5))
@pytest.mark.parametrize("name", NAMES)
def test_teams(library, monkeypatch, name, threads, held):
    """Several threads a row, with all, some or none of it in the team's memory."""
    case = cast(make(name, 3, 77, teachers=3), torch.float32)
    upstream = torch.tensor([0.5, -2.0, 3.0])
    settings = settings_for(name, 77)
    check(library, monkeypatch, name, case, settings, upstream=upstream, threads=threads, held=held)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_class_probabilities(library, monkeypatch, name, dtype):
    case = cast(make(name, 9, 33), dtype)
    case.target = probabilities(9, 33).to(dtype)
    for threads in (1, 3):
        check(library, monkeypatch, name, case, settings_for(name, 33), threads=threads)
    # Not only two classes, and not only labels with the highest logits.
    case.target = torch.softmax(torch.arange(9 * 33).reshape(9, 33).double().sin(), 1).to(dtype)
    check(library, monkeypatch, name, case, settings_for(name, 33))


@pytest.mark.parametrize(
    "student, teacher",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_types(library, monkeypatch, name, student, teacher):
    case = cast(make(name, 9, 37), student, teacher)
    check(library, monkeypatch, name, case, settings_for(name, 37))


@pytest.mark.parametrize("count", (1, 2, 3, 5))
def test_several_teachers(library, monkeypatch, count):
    case = cast(make("kd", 9, 33, teachers=count), torch.float32)
    weights = [0.0 if k == 1 else 1.0 / (k + 1) for k in range(count)]
    for more in ({}, {"teacher_weights": weights}):
        check(library, monkeypatch, "kd", case, settings_for("kd", 33, **more))


@pytest.mark.parametrize("count", (1, 2, 3))
@pytest.mark.parametrize("detach", (True, False))
def test_several_slts(library, monkeypatch, detach, count):
    case = cast(make("slkd", 9, 33, slts=count), torch.float32)
    fusion = [(k + 1) * 2 / (count * (count + 1)) for k in range(count)]
    settings = settings_for("slkd", 33, fusion=fusion, detach_slts=detach)
    check(library, monkeypatch, "slkd", case, settings)
    check(library, monkeypatch, "slkd", case, settings, held=3, threads=2)


@pytest.mark.parametrize("rest", ("spread", "drop"))
@pytest.mark.parametrize("k", (1, 7, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("name", ("kd", "nkd"))
def test_top_k_teachers(library, monkeypatch, name, dtype, k, rest):
    """Beside a whole teacher for kd; the first label is listed, the last one is not."""
    case = cast(make(name, 9, 41, teachers=2), dtype)
    wide = case.teachers[0].double()
    wide += torch.arange(9)[:, None] * 400.0  # some rows far from 0
    top = kdfuse.SparseTeacher.top_k(wide, k, temperature=2.0, rest=rest)
    case.target[0], case.target[-1] = top.indices[0, 0], wide[-1].argmin()
    settings = settings_for(name, 41, temperature=2.0)
    students, _, target, params = host_rows.arguments(monkeypatch, name, case, **settings)
    teachers = [top.values.to(dtype), *case.teachers[1 : len(case.teachers)]]
    empty = torch.empty(0, dtype=torch.int64)
    mass = torch.empty(0) if top.mass is None else top.mass
    indices = [top.indices, empty][: len(teachers)]
    masses = [mass, torch.empty(0)][: len(teachers)]
    op = getattr(torch.ops.kdfuse, name).default
    true = op(students, teachers, indices, masses, target, None, None, params, 0, -100, True)
    for threads, held in ((1, 8), (3, 8), (3, 0)):
        got = host_rows.run(
            library,
            name,
            students,
            teachers,
            target,
            params,
            reduction=0,
            threads=threads,
            held=held,
            indices=indices,
            masses=masses,
        )
        loose = 1e-11 if dtype == torch.float64 else 1e-4
        near(got[0], true[0], "loss", loose, loose)
        near(got[1], true[1], "terms", loose, loose)
        step = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 8e-3}[dtype]
        near(got[2][0].double(), true[2][0].double(), "gradient", step, min(step, 1e-5))


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0, 7.5))
@pytest.mark.parametrize("name", ("kd", "dkd", "nkd", "slkd"))
def test_temperatures(library, monkeypatch, name, temperature):
    case = cast(make(name, 9, 33), torch.float32)
    settings = settings_for(name, 33, temperature=temperature)
    check(library, monkeypatch, name, case, settings)


def test_kd_without_target(library, monkeypatch):
    case = cast(make("kd", 9, 33), torch.float32)
    case = Case(case.students, case.teachers, None)
    check(library, monkeypatch, "kd", case, settings_for("kd", 33, ce_weight=0.0))


@pytest.mark.parametrize("reduction", (0, 1, 2))
@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows(library, monkeypatch, name, reduction):
    case = cast(make(name, 9, 33), torch.float32)
    case.target[::3] = -100
    for x in (*case.students, *case.teachers):
        x[0] = float("nan")  # an ignored row may hold anything
    check(library, monkeypatch, name, case, settings_for(name, 33), reduction=reduction)
    case.target[:] = -100
    check(library, monkeypatch, name, case, settings_for(name, 33), reduction=reduction, threads=2)


def students_masked(case):
    for x in (*case.students, *case.teachers):
        x[:, 3:20] = -INF


def teachers_masked(case):
    for x in case.teachers:
        x[:, :17] = -INF


def labels_masked(case):
    for x in case.students:
        x[torch.arange(len(x)), case.target] = -INF


def label_alone(case):
    for x in (*case.students, *case.teachers):
        kept = x[torch.arange(len(x)), case.target].clone()
        x[:] = -INF
        x[torch.arange(len(x)), case.target] = kept


def ties(case):
    for x in (*case.students, *case.teachers):
        x.copy_(x.sign())


def far(case):
    for x in (*case.students, *case.teachers):
        x += 1e4


def saturated(case):
    for x in (*case.students, *case.teachers):
        x *= 100


@pytest.mark.parametrize(
    "change",
    (students_masked, teachers_masked, labels_masked, label_alone, ties, far, saturated),
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("name", NAMES)
def test_hard_rows(library, monkeypatch, name, change):
    # In double: float32 rounds the ranks of tied and far keys its own way.
    case = cast(make(name, 9, 33), torch.float64 if name == "uskd" else torch.float32)
    change(case)
    check(library, monkeypatch, name, case, settings_for(name, 33))


@pytest.mark.parametrize("rank", ("released", "paper"))
def test_ranks(library, monkeypatch, rank):
    case = make("uskd", 9, 100)
    random = torch.Generator().manual_seed(0)
    case.students = [torch.randn(9, 100, generator=random).double() for _ in range(2)]
    for threads in (1, 3):
        settings = settings_for("uskd", 100, rank=rank)
        check(library, monkeypatch, "uskd", case, settings, threads=threads)


@pytest.mark.parametrize("name", NAMES)
def test_strides(library, monkeypatch, name):
    def strided(x):
        return torch.cat([x, torch.full((len(x), 5), float("nan"), dtype=x.dtype)], 1)[
            :, : x.shape[1]
        ]

    case = cast(make(name, 9, 33), torch.float32)
    students = [strided(x) if k % 2 == 0 else x for k, x in enumerate(case.students)]
    case = Case(students, [strided(x) for x in case.teachers], case.target)
    check(library, monkeypatch, name, case, settings_for(name, 33))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", ("kd", "dkd", "slkd"))
def test_equal_logits_give_exactly_zero(library, monkeypatch, name, dtype):
    case = cast(make(name, 9, 100), dtype)
    same = case.teachers[0]
    case = Case([same.clone() for _ in case.students], [same], case.target)
    settings = settings_for(name, 100, ce_weight=0.0)
    if name == "slkd":
        settings |= {"fused_ce_weight": 0.0, "detach_slts": True}
    inputs = host_rows.arguments(monkeypatch, name, case, **settings)
    upstream = torch.full((9,), 0.3, dtype=torch.float64)
    loss, _, gradients = host_rows.run(
        library, name, *inputs, reduction=0, upstream=upstream, threads=3
    )
    if name == "slkd":  # the student learns from two teachers, whose parts are rounded apart
        assert gradients[0].abs().max() < 1e-6
        gradients = gradients[1:]
    assert not loss.any()
    assert not any(g.any() for g in gradients)
