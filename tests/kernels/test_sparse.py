"""Top-k teachers: each loss is that of the whole row that they stand for.

That row is written here from its probabilities: those of marginal smoothing, where the rest shares
its mass evenly, or of marginal re-norm, where it has none.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from calls import (
    FULL,
    WITH_PROBABILITIES,
    WITH_TOP_K,
    Case,
    call,
    compare,
    loss_type,
    make,
    params_of,
    probabilities,
    with_switch,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdfuse
from kdfuse import SparseTeacher
from kdfuse.kernels import backends
from kdfuse.kernels.op import REDUCTIONS

pytestmark = pytest.mark.slow(25)

BACKENDS = [name for name in ("reference", "cpu") if not backends.backends()[name]]
LEVELS = backends.compiled()[0].levels() if "cpu" in BACKENDS else []
RESTS = ("spread", "drop", "zero")
INF = float("inf")
needs_compiled = pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled module")


@pytest.fixture(params=LEVELS)
def level(request):
    module = backends.compiled()[0]
    before = module.level()
    module.set_level(request.param)
    yield request.param
    module.set_level(before)


def lists(case: Case, k: int, rest: str, seed: int = 0) -> SparseTeacher:
    """k classes of each row in any order, in every other row with the label, and any mass."""
    random = np.random.default_rng(seed)
    n, c = case.teachers[0].shape
    label = case.target if case.target.dim() == 1 else case.target.argmax(1)
    indices = np.zeros((n, k), np.int64)
    for row in range(n):
        y = max(int(label[row]), 0)
        others = random.permutation(np.delete(np.arange(c), y))
        indices[row] = random.permutation(np.append(others[: k - 1], y) if row % 2 else others[:k])
    indices = torch.from_numpy(indices)
    values = case.teachers[0].gather(1, indices)
    if rest == "drop":
        return SparseTeacher(values, indices)
    mass = torch.from_numpy(random.choice([1e-30, 1e-3, 0.25, 0.5, 0.875, 1 - 2**-12], n)).float()
    return SparseTeacher(values, indices, mass.double() if rest == "spread" else 0 * mass)


def whole(x: SparseTeacher, c: int, temperature: float) -> Tensor:
    """(N, C) float64: T * log of the row's probabilities at T, from these alone."""
    values, indices = x.values.double().numpy(), x.indices.long().numpy()
    e = np.exp((values - values.max(1, keepdims=True)) / temperature)
    mass = np.zeros((len(values), 1)) if x.mass is None else x.mass.double().numpy()[:, None]
    rows = np.tile(mass / (c - values.shape[1]), (1, c))
    rows[np.arange(len(rows))[:, None], indices] = (1 - mass) * e / e.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        return torch.from_numpy(temperature * np.log(rows))


def settings_of(name: str, **more) -> dict:
    return {**FULL[name], **more}


def check(name: str, case: Case, given: list, *, backend: str, stored: bool = True, **settings):
    """Losses and gradients of every row; `given` stands for the teachers of `case` in the call."""
    z = case.students[0].detach().requires_grad_()
    common = {"backend": backend, "reduction": "none", "stored_gradient": stored}
    loss = call(name, Case([z], given, case.target), **common, **settings)
    weight = 2.0 ** (torch.arange(len(z)) % 5 - 2) * (1 - 2 * (torch.arange(len(z)) % 2))
    (g,) = torch.autograd.grad(loss, z, weight.to(loss.dtype))
    kinds = {x.values.dtype if isinstance(x, SparseTeacher) else x.dtype for x in given}
    assert loss.dtype == loss_type(z.dtype, *kinds)
    compare(name, case, weight, loss.detach(), [g], **settings)


def checked(name, case, sparse, *, backend, **more):
    stored = more.pop("stored", True)
    setting = settings_of(name, **more)
    dense = whole(sparse, case.students[0].shape[1], setting["temperature"])
    as_whole = Case(case.students, [dense], case.target)
    check(name, as_whole, [sparse], backend=backend, stored=stored, **setting)


def of_type(x: SparseTeacher, values, indices=torch.int64, mass=torch.float64) -> SparseTeacher:
    kept = None if x.mass is None else x.mass.to(mass)
    return SparseTeacher(x.values.to(values), x.indices.to(indices), kept)


SHAPES = [(24, c, k) for c in (3, 31, 1000) for k in (1, 5, c - 1) if k < c] + [(3, 21841, 5)]
SHAPES += [(2, 21841, 21840), (3, 21841, 1), (0, 31, 5), (300, 31, 2)]


@pytest.mark.parametrize("n, c, k", SHAPES)
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_shapes(name, backend, rest, n, c, k):
    case = make(name, n, c)
    sparse = lists(case, k, rest)
    if backend == "cpu" or c < 1000:  # so many equal classes are no test of float32 in PyTorch
        case.students = [x.float() for x in case.students]
        sparse = of_type(sparse, torch.float32)
    checked(name, case, sparse, backend=backend)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0, 3.0, 4.0, 20.0))
@pytest.mark.parametrize("on", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_temperatures(name, backend, on, temperature):
    case = make(name, 40, 33)
    more = {"temperature": temperature, **with_switch(name, on)}
    for rest in ("spread", "drop"):
        checked(name, case, lists(case, 6, rest), backend=backend, **more)


@pytest.mark.parametrize("student", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("values", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_types(name, backend, stored, values, student):
    case = make(name, 24, 33)
    sparse = lists(case, 6, "spread")
    case.students = [x.to(student) for x in case.students]
    for index, mass in ((torch.int64, torch.float64), (torch.int32, torch.float32)):
        typed = of_type(sparse, values, index, mass)
        checked(name, case, typed, backend=backend, stored=stored)
    typed = of_type(lists(case, 6, "drop"), values, torch.int16)
    checked(name, case, typed, backend=backend, stored=stored)


@pytest.mark.parametrize("c", (3, 16, 17, 100, 1001))
@pytest.mark.parametrize("values", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_simd_levels(name, level, values, c):
    case = make(name, 24, c)
    for rest, k in (("spread", 2), ("drop", 1), ("spread", c - 1)):
        sparse = of_type(lists(case, k, rest), values)
        students = [x.float() for x in case.students]
        checked(name, Case(students, case.teachers, case.target), sparse, backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_and_top_k_teachers_together(backend):
    case = make("kd", 40, 33, teachers=4)
    sparse = [
        lists(Case(case.students, case.teachers[i:], case.target), k, rest, seed=i)
        for i, k, rest in ((1, 6, "spread"), (2, 32, "drop"), (3, 1, "spread"))
    ]
    setting = {**settings_of("kd"), "teacher_weights": [0.25, 1.5, 0.5, 0.75]}
    rows = [whole(x, 33, setting["temperature"]) for x in sparse]
    as_whole = Case(case.students, [case.teachers[0], *rows], case.target)
    for stored in (True, False):
        check(
            "kd", as_whole, [case.teachers[0], *sparse], backend=backend, stored=stored, **setting
        )
    without = Case(case.students, [case.teachers[0], rows[0]], case.target)
    nothing = SparseTeacher(sparse[1].values * torch.nan, sparse[1].indices)
    setting["teacher_weights"] = [0.25, 1.5]
    check("kd", without, [case.teachers[0], sparse[0]], backend=backend, **setting)
    z = case.students[0]
    got = kdfuse.kd_loss(z, [nothing, *sparse], teacher_weights=[0, 1, 2, 3], backend=backend)
    want = kdfuse.kd_loss(z, sparse, teacher_weights=[1, 2, 3], backend=backend)
    assert got == want  # a weight of 0 leaves its teacher out, whatever it holds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n in WITH_TOP_K if n in WITH_PROBABILITIES])
def test_class_probabilities(name, backend):
    case = make(name, 40, 33)
    case.target = probabilities(40, 33)
    for rest in ("spread", "drop"):
        checked(name, case, lists(case, 6, rest), backend=backend)


def some(x):
    x[:, 1:3] = -INF


def all_but_one(x):
    x[:, 1:] = -INF


def saturated(x):
    x[:] = torch.sign(x) * 1e4


def shifted(x):
    x += 1e4


def shifted_down(x):
    x -= 60000


@pytest.mark.parametrize("pattern", (some, all_but_one, saturated, shifted, shifted_down))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_hard_values(name, backend, dtype, pattern):
    case = make(name, 24, 33)
    for rest in RESTS:
        sparse = lists(case, 6, rest)
        pattern(sparse.values)
        students = [x.to(dtype) for x in case.students]
        given = of_type(sparse, dtype)
        checked(name, Case(students, case.teachers, case.target), given, backend=backend)


@pytest.mark.parametrize("shift", (-4096.0, 31.0, 33.0, 60000.0))
@pytest.mark.parametrize("name", WITH_TOP_K)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_of_the_values_changes_nothing(backend, name, shift):
    case = make(name, 24, 33)
    sparse = of_type(lists(case, 6, "spread"), torch.float32)
    moved = SparseTeacher(sparse.values + shift, sparse.indices, sparse.mass)
    z = case.students[0].float()
    common = {**settings_of(name), "backend": backend, "reduction": "none"}
    got, want = (call(name, Case([z], [t], case.target), **common) for t in (moved, sparse))
    torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-6)


FEW = settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
@FEW
@given(
    n=st.integers(0, 9),
    c=st.sampled_from([3, 4, 7, 8, 9, 15, 16, 17, 33, 65]),
    part=st.floats(0, 1),
    rest=st.sampled_from(RESTS),
    temperature=st.floats(0.5, 20),
    seed=st.integers(0, 99),
)
def test_any_shape(name, backend, n, c, part, rest, temperature, seed):
    case = make(name, n, c, seed=seed)
    sparse = lists(case, 1 + round(part * (c - 2)), rest, seed)
    checked(name, case, sparse, backend=backend, temperature=temperature)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("temperature", (1.0, 3.0, 4.0))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_all_classes_but_one_are_the_whole_teacher(name, backend, temperature, dtype):
    """The one class that is left out has the mass that it has: nothing is approximated."""
    case = make(name, 24, 33)
    z, t = case.students[0].to(dtype).requires_grad_(), case.teachers[0].to(dtype)
    sparse = SparseTeacher.top_k(t, 32, temperature=temperature)
    common = settings_of(name, temperature=temperature)
    results = []
    for teacher in (sparse, t):
        loss = call(name, Case([z], [teacher], case.target), backend=backend, **common)
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    rtol = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=rtol, atol=0)
    rtol, atol = {torch.bfloat16: (2**-7, 1e-6)}.get(dtype, (10 * rtol, rtol / 10))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("rest", ("spread", "drop"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("c, k", [(3, 1), (31, 5), (1000, 20), (1000, 999)])
def test_a_student_equal_to_the_whole_row_is_exactly_zero(level, c, k, dtype, rest):
    t = torch.randn(5, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 7
    sparse = SparseTeacher.top_k(t.to(dtype), k, temperature=3.0, rest=rest)
    z = sparse.dense(c, 3.0).requires_grad_()
    assert z.dtype == dtype
    loss = kdfuse.kd_loss(z, sparse, torch.arange(5) % c, temperature=3.0, backend="cpu")
    (g,) = torch.autograd.grad(loss, z)
    if dtype == torch.float64 and rest == "spread":  # the fill differs in its last bit
        assert loss.abs() < 1e-13 and g.abs().max() < 1e-15
    else:
        assert loss.item() == 0 and not g.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_the_order_of_a_list_does_not_matter(name, backend):
    case = make(name, 24, 33)
    sparse = lists(case, 9, "spread")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    other = SparseTeacher(sparse.values[:, order], sparse.indices[:, order], sparse.mass)
    common = {**settings_of(name), "backend": backend, "reduction": "none"}
    got, want = (
        call(name, Case(case.students, [t], case.target), **common) for t in (other, sparse)
    )
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_dense_is_the_row_of_the_probabilities():
    case = make("kd", 24, 33)
    for temperature in (1.0, 4.0):
        for rest in RESTS:
            sparse = lists(case, 6, rest)
            dense = sparse.dense(33, temperature)
            assert torch.equal(dense.gather(1, sparse.indices), sparse.values)
            rows = whole(sparse, 33, temperature)
            want = (rows / temperature).exp()
            got = (dense / temperature).softmax(1)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-40)
            assert sparse.dense(33, temperature).dtype == torch.float64
            half = of_type(sparse, torch.float16).dense(33, temperature)
            assert half.dtype == torch.float32


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("k", (1, 5, 32))
def test_top_k_of_whole_logits(k, dtype):
    t = make("kd", 24, 33).teachers[0].to(dtype)
    for temperature in (1.0, 4.0):
        sparse = SparseTeacher.top_k(t, k, temperature=temperature)
        assert sparse.values.dtype == dtype and sparse.indices.dtype == torch.int64
        order = t.sort(dim=1, descending=True).values
        assert torch.equal(sparse.values, order[:, :k])
        assert torch.equal(t.gather(1, sparse.indices), sparse.values)
        softmax = (order.double() / temperature).softmax(1)
        assert sparse.mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        rtol = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(sparse.mass.double(), softmax[:, k:].sum(1), rtol=rtol, atol=0)
    dropped = SparseTeacher.top_k(t, k, temperature=1.0, rest="drop")
    assert dropped.mass is None and torch.equal(dropped.values, sparse.values)


def test_a_small_mass_keeps_its_digits():
    t = torch.zeros(1, 100)
    t[0, 7] = 60.0
    sparse = SparseTeacher.top_k(t, 1, temperature=1.0)
    assert sparse.mass.item() == pytest.approx(99 * np.exp(-60.0), rel=1e-6)
    z = torch.zeros(1, 100, dtype=torch.float64)
    loss = kdfuse.kd_loss(z, SparseTeacher(*top(sparse)), temperature=1.0)
    assert loss.item() == pytest.approx(np.log(100), rel=1e-12)


def top(x: SparseTeacher) -> tuple[Tensor, Tensor, Tensor | None]:
    return x.values, x.indices, x.mass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_ignored_rows_may_hold_anything(name, backend):
    case = make(name, 24, 33)
    sparse = lists(case, 6, "spread")
    common = {**settings_of(name), "backend": backend, "return_terms": True}
    kept = [i for i in range(24) if i % 3]
    of_kept = SparseTeacher(*[x[kept] for x in top(sparse)])
    want, terms = call(name, Case([case.students[0][kept]], [of_kept], case.target[kept]), **common)
    case.target[::3] = -100
    case.students[0][::3] = torch.nan
    sparse.values[::3] = torch.nan
    sparse.indices[::3] = torch.tensor([-7, 33, 10**12, 1, 1, 1])
    sparse.mass[::3] = 7.0
    z = case.students[0].requires_grad_()
    for stored in (True, False):
        loss, of_rows = call(
            name, Case([z], [sparse], case.target), stored_gradient=stored, **common
        )
        torch.testing.assert_close(loss.detach(), want, rtol=1e-13, atol=0)
        torch.testing.assert_close(of_rows, terms, rtol=1e-12, atol=1e-13)
        (g,) = torch.autograd.grad(loss, z)
        assert not g[::3].any() and g[kept].isfinite().all() and g[kept].any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_nan_reaches_its_row_alone(name, backend):
    case = make(name, 6, 33)
    for part in ("values", "mass"):
        sparse = of_type(lists(case, 6, "spread"), torch.float32)
        getattr(sparse, part)[2] = torch.nan
        students = [x.float() for x in case.students]
        common = {**settings_of(name), "backend": backend, "reduction": "none"}
        loss = call(name, Case(students, [sparse], case.target), **common)
        assert loss.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_layouts(name, backend):
    case = make(name, 9, 33)
    sparse = lists(case, 6, "spread")
    wider = [x.repeat_interleave(3, 1) for x in (sparse.values, sparse.indices)]
    apart = SparseTeacher(wider[0][:, ::3], wider[1][:, ::3], sparse.mass.repeat_interleave(2)[::2])
    turned = SparseTeacher(sparse.values.T.contiguous().T, sparse.indices.T.contiguous().T)
    dropped = SparseTeacher(sparse.values, sparse.indices)
    one_row = SparseTeacher(*[x[:1].expand(9, *x.shape[1:]) for x in top(sparse)])
    copied = SparseTeacher(*[x.clone() for x in top(one_row)])
    for got, want in ((apart, sparse), (turned, dropped), (one_row, copied)):
        losses = [
            call(name, Case(case.students, [t], case.target), backend=backend, **settings_of(name))
            for t in (got, want)
        ]
        assert losses[0] == losses[1]


Z, Y = torch.zeros(4, 5), torch.tensor([0, 1, 2, 4])
V, I = torch.zeros(4, 2), torch.tensor([[0, 1]] * 4)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((V.numpy(), I), TypeError, "values must be a tensor, got ndarray"),
        ((V, I.tolist()), TypeError, "indices must be a tensor, got list"),
        ((V, I, 0.1), TypeError, "mass must be a tensor, got float"),
        ((I, I), TypeError, "values must have a floating type, got torch.int64"),
        ((V, V), TypeError, r"indices must be int64, .* got torch.float32; use indices.long\(\)"),
        ((V, I.to(torch.uint8)), TypeError, "indices must be int64, .* got torch.uint8"),
        ((V, I, torch.zeros(4).half()), TypeError, "mass must be float32 .* got torch.float16"),
        ((V[0], I[0]), ValueError, r"values must have shape \(N, k\), k at least 1, got \(2,\)"),
        ((V[:, :0], I[:, :0]), ValueError, r"k at least 1, got \(4, 0\)"),
        ((V, I[:, :1]), ValueError, r"indices must have the values' shape \(4, 2\), got \(4, 1\)"),
        ((V, I, torch.zeros(4, 1)), ValueError, r"mass must have shape \(4,\), got \(4, 1\)"),
        ((V, I.to("meta")), ValueError, "indices is on meta, values on cpu; move one of them"),
        ((V, I, torch.zeros(4, device="meta")), ValueError, "mass is on meta, values on cpu"),
    ],
)
def test_refused_parts(arguments, error, text):
    with pytest.raises(error, match=text):
        SparseTeacher(*arguments)


def changed(x: Tensor, at, value) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


ENTRIES = [
    (SparseTeacher(V, changed(I, (2, 1), 5)), r"indices\[2, 1\] is 5, outside the 5 classes"),
    (SparseTeacher(V, changed(I, (0, 0), -1).short()), r"indices\[0, 0\] is -1, outside the 5"),
    (SparseTeacher(V, changed(I, (3, 1), 2**40)), r"indices\[3, 1\] is 1099511627776, outside"),
    (SparseTeacher(V, changed(I, (1, 1), 0)), r"indices\[1, 1\] is 0, listed twice in its row"),
    (SparseTeacher(V, I, changed(Z[:, 0], 2, 1.0)), r"mass\[2\] is 1, outside \[0, 1\)"),
    (SparseTeacher(V, I, changed(Z[:, 0], 3, -0.5)), r"mass\[3\] is -0.5, outside \[0, 1\)"),
]


@pytest.mark.parametrize("wrong, text", ENTRIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_refused_entries(name, backend, wrong, text):
    refusals = (ValueError, RuntimeError)
    for z in (Z, Z.clone().requires_grad_()):
        with pytest.raises(refusals, match=r"teacher\." + text):
            call(name, Case([z], [wrong], Y), backend=backend)
    if name == "kd":
        with pytest.raises(refusals, match=r"teacher\[1\]\." + text):
            kdfuse.kd_loss(Z, [Z, wrong], backend=backend)
    with pytest.raises(ValueError, match="^" + text):
        wrong.dense(5, 4.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_refused_beside_a_student(name, backend):
    for wrong, text in (
        (SparseTeacher(V[:3], I[:3]), r"teacher.values must have the student's 4 rows, got \(3, 2"),
        (SparseTeacher(Z, Z.long()), r"teacher.values.shape\[1\] is 5, but of 5 classes 1 to 4"),
        (SparseTeacher(V.to("meta"), I.to("meta")), "teacher is on meta, the student on cpu"),
        (SparseTeacher(V.clone().requires_grad_(), I), r"teacher.values requires .*values.detach"),
        (
            SparseTeacher(V, I, torch.zeros(4).requires_grad_()),
            r"teacher.mass requires grad.*mass.detach\(\)",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call(name, Case([Z], [wrong], Y), backend=backend)


def test_other_losses_name_the_cure():
    text = r"slkd_loss takes whole .* SparseTeacher; pass teacher.dense\(classes=5, temperature="
    with pytest.raises(TypeError, match=text):
        call("slkd", Case([Z] * 3, [SparseTeacher(V, I)], Y))
    assert call("slkd", Case([Z] * 3, [SparseTeacher(V, I).dense(5, 4.0)], Y)).isfinite()
    with pytest.raises(TypeError, match="weak must be .* got SparseTeacher"):
        kdfuse.uskd_loss(Z, SparseTeacher(V, I), Y)


def test_refused_settings_of_top_k_and_dense():
    for k in (0, 5, -1):
        with pytest.raises(ValueError, match=f"k is {k}, but of 5 classes 1 to 4 can be listed"):
            SparseTeacher.top_k(Z, k, temperature=1.0)
    with pytest.raises(ValueError, match="rest must be one of spread, drop, got 'keep'"):
        SparseTeacher.top_k(Z, 2, temperature=1.0, rest="keep")
    for wrong in (0.0, -1.0, INF):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            SparseTeacher.top_k(Z, 2, temperature=wrong)
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            SparseTeacher(V, I).dense(5, wrong)
    with pytest.raises(ValueError, match=r"values.shape\[1\] is 2, but of 2 classes 1 to 1"):
        SparseTeacher(V, I).dense(2, 1.0)
    with pytest.raises(TypeError, match="teacher must have a floating type"):
        SparseTeacher.top_k(Z.long(), 2, temperature=1.0)


def compiled_arguments(name, grad, rest, reduction="mean", with_gradient=False):
    case = make(name, 6, 9)
    sparse = lists(case, 3, rest)
    students = [x.float().requires_grad_(grad) for x in case.students]
    params = params_of(name)
    teachers, indices, masses = [sparse.values], [sparse.indices], [sparse.mass]
    if rest == "drop":
        masses = [torch.empty(0)]
    if name == "kd":  # beside a whole one
        teachers, params = [case.teachers[0], *teachers], [*params, 1.0]
        indices, masses = [torch.empty(0, dtype=torch.int64), *indices], [torch.empty(0), *masses]
    static = (params, REDUCTIONS[reduction], -100, with_gradient)
    return (students, teachers, indices, masses, case.target, None, None, None, *static)


@needs_compiled
@pytest.mark.parametrize("rest", ("spread", "drop"))
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_opcheck(name, rest):
    op = getattr(torch.ops.kdfuse, name).default
    for grad in (False, True):
        for reduction in ("mean", "none"):
            torch.library.opcheck(op, compiled_arguments(name, grad, rest, reduction))
    torch.library.opcheck(op, compiled_arguments(name, False, rest, with_gradient=True))


@needs_compiled
def test_the_bare_op_has_the_gradient_of_the_public_function():
    students, *more = compiled_arguments("nkd", True, "spread")
    (g,) = torch.autograd.grad(torch.ops.kdfuse.nkd(students, *more)[0], students[0])
    case = make("nkd", 6, 9)
    z, sparse = students[0].detach().requires_grad_(), lists(case, 3, "spread")
    loss = kdfuse.nkd_loss(z, sparse, case.target, temperature=2.0, ce_weight=0.3)
    assert torch.equal(torch.autograd.grad(loss, z)[0], g)


@needs_compiled
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_the_bare_op_counts_what_it_is_given(name):
    op = getattr(torch.ops.kdfuse, name).default
    students, teachers, indices, masses, *more = compiled_arguments(name, False, "spread")
    index, mass = indices[-1], masses[-1]
    for wrong_indices, wrong_masses, text in (
        ([], masses, "indices and masses must be empty or as many as"),
        (indices, masses * 2, "indices and masses must be empty or as many as"),
        ([*indices[:-1], index.int()], masses, r"indices must be int64 of shape \(6, k\)"),
        ([*indices[:-1], index[:5]], masses, r"indices must be int64 of shape \(6, k\)"),
        ([*indices[:-1], index[:, ::2]], masses, "indices must have unit stride|shape"),
        ([*indices[:-1], index.repeat(1, 3)], masses, "is 9, but of 9 classes 1 to 8"),
        ([*indices[:-1], index[:, :2]], masses, r"teacher must have shape \(6, 2\)"),
        ([*indices[:-1], index[:0, 0]], masses, "has a mass, but no indices"),
        (indices, [*masses[:-1], mass[:5]], r"mass must be float32 or float64 of shape \(6,\)"),
        (indices, [*masses[:-1], mass.half()], "mass must be float32 or float64"),
    ):
        with pytest.raises(RuntimeError, match=text):
            op(students, teachers, wrong_indices, wrong_masses, *more)
    slkd = torch.ops.kdfuse.slkd.default
    params = params_of("slkd")
    with pytest.raises(RuntimeError, match="whole teacher logits only"):
        slkd(students * 3, teachers[-1:], [index], [mass], *more[:4], params, *more[5:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, stored", [("kd", True), ("nkd", False)])
def test_compile_is_one_graph(name, backend, stored):
    torch._dynamo.reset()

    def step(z, sparse, values, target):
        inside = SparseTeacher(values * 2, sparse.indices + 0, sparse.mass + 0)
        teachers = [sparse, inside] if name == "kd" else [inside]
        common = {**settings_of(name), "backend": backend, "stored_gradient": stored}
        return 2 * call(name, Case([z], teachers, target), **common)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (8, 13, 5):
        case = make(name, n, 33)
        sparse = of_type(lists(case, 6, "spread"), torch.float32)
        case.target[2] = -100
        results = []
        for function in (step, compiled):
            z = case.students[0].float().requires_grad_()
            loss = function(z, sparse, sparse.values, case.target)
            results.append([loss.detach(), torch.autograd.grad(loss, z)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_compile_of_the_way_from_whole_logits_and_back():
    torch._dynamo.reset()
    t = make("kd", 6, 33).teachers[0]

    def step(t):
        sparse = SparseTeacher.top_k(t, 5, temperature=2.0)
        return sparse.dense(33, 2.0), kdfuse.kd_loss(t * 0, sparse, temperature=2.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t), step(t), rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_autocast_changes_nothing(name, backend):
    case = make(name, 6, 33)
    sparse = of_type(lists(case, 6, "spread"), torch.float32)
    z = case.students[0].float()
    common = {**settings_of(name), "backend": backend}
    want = call(name, Case([z], [sparse], case.target), **common)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(name, Case([z], [sparse], case.target), **common)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("name", WITH_TOP_K)
def test_torch_func_and_double_backward_take_the_reference(name):
    case = make(name, 4, 5)
    sparse = lists(case, 2, "spread")

    def function(z):
        return call(name, Case([z], [sparse], case.target), **settings_of(name))

    z = case.students[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(function(z), z)
    torch.testing.assert_close(torch.func.grad(function)(z.detach()), want)

    def reference(z):
        common = {**settings_of(name), "backend": "reference"}
        return call(name, Case([z], [sparse], case.target), **common)

    assert torch.autograd.gradgradcheck(reference, z, atol=1e-6)


@needs_compiled
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_the_same_bits_at_any_number_of_threads(name):
    case = make(name, 499, 257)
    sparse = of_type(lists(case, 6, "spread"), torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            z = case.students[0].float().requires_grad_()
            loss = call(name, Case([z], [sparse], case.target), **settings_of(name))
            results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, g in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(g, results[0][1])


def test_modules_take_them_as_well():
    case = make("kd", 6, 33)
    sparse = lists(case, 6, "spread")
    z, y = case.students[0], case.target
    assert kdfuse.KDLoss(temperature=2.0)(z, sparse) == kdfuse.kd_loss(z, sparse, temperature=2.0)
    assert kdfuse.NKDLoss(gamma=2.0)(z, sparse, y) == kdfuse.nkd_loss(z, sparse, y, gamma=2.0)


MEMORY = """
import re
from pathlib import Path
import torch
from kdfuse import SparseTeacher, kd_loss

def memory(key):
    return 1024 * int(re.search(key + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(2)
n, c, k = 512, 21841, 20
z = torch.zeros(n, c).normal_().requires_grad_()
t = SparseTeacher(torch.zeros(n, k), torch.arange(k).expand(n, k).clone(), torch.full((n,), 0.5))
small = SparseTeacher(t.values[:8], t.indices[:8], t.mass[:8])
kd_loss(z.detach()[:8].requires_grad_(), small).backward()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from here
before = memory("VmRSS")
kd_loss(z, t).backward()
print((memory("VmHWM") - before) / (n * c * 4))
"""


@needs_compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_whole_teacher_is_made(request):
    """The peak of resident memory grows by the gradient's bytes, in a process of its own."""
    folder = str(request.path.parent)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3
