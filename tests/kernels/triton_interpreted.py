"""Every loss through Triton's interpreter, against formulas in float64 (see oracle.py, calls.py).

Started by test_triton.py, which sets TRITON_INTERPRET=1. Few rows and classes: the interpreter
takes some hundredths of a second for a row. It rounds bfloat16 towards zero. What varies is paired
rather than multiplied: each type, residency and setting comes with the others in turn.
"""

import types

import numpy as np
import pytest
import torch
import triton.language as tl
from calls import (
    FULL,
    NAMES,
    NO_TEACHER,
    PAIR,
    WITH_PROBABILITIES,
    WITH_TEACHER,
    WITH_TOP_K,
    Case,
    arguments,
    call,
    cast,
    loss_and_gradients,
    make,
    probabilities,
    truth,
    with_switch,
)
from triton.runtime import interpreter

import kdfuse
from kdfuse.kernels.table import OPS
from kdfuse.kernels.triton import call as triton_call
from kdfuse.kernels.triton import launch as triton_launch

INF = float("inf")
# numpy's, of -inf - -inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def language_patched_once():
    """Triton patches its language for each launch and again in each function that a kernel calls,
    which takes most of the time. Here it does so once.
    """
    scope = interpreter._patch_lang(
        types.FunctionType(compile("", "", "exec"), {"tl": tl, "core": tl.core})
    )
    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        yield
    scope.restore()


def in_tiles(monkeypatch):
    monkeypatch.setattr(triton_launch, "HELD", 0)
    monkeypatch.setattr(triton_launch, "TILES", (16, 1))


@pytest.fixture(params=("one block", "tiles"))
def residency(request, monkeypatch):
    """A row in one block, and in tiles of 16 classes. USKD ranks its rows in one block alone."""
    if request.param == "tiles":
        in_tiles(monkeypatch)


@pytest.fixture(params=(torch.float32, torch.float64), ids=("float32 in tiles", "float64"))
def dtype_by_residency(request, monkeypatch):
    if request.param == torch.float32:
        in_tiles(monkeypatch)
    return request.param


def paired(names, *values):
    """What varies in step with `residency`, the last of each value."""
    return pytest.mark.parametrize(f"{names}, residency", values, indirect=["residency"], ids=str)


def settings_for(name, c=0, **more):
    return {**FULL[name], **(PAIR.get(name, {}) if c == 2 else {}), **more}


def near(name, case, upstream=None, **settings):
    """Losses and gradients of the rows under random upstream gradients, against the oracle."""
    n = len(case.students[0])
    if upstream is None:
        upstream = torch.tensor([1.0, -2.0, 0.5, 0.0, 4.0, -0.25, 1.0, 3.0])[:n]
    stored = settings.pop("stored_gradient", True)
    loss, gradients = loss_and_gradients(
        name,
        case,
        upstream,
        reduction="none",
        backend="triton",
        stored_gradient=stored,
        **settings,
    )
    true = truth(name, case, **settings)
    types = [x.dtype for x in (*case.students, *case.teachers)]
    wide = torch.float64 in types
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    numbers = [x[x.isfinite()].abs().max().item() for x in (*case.students, *case.teachers)]
    largest = max([1.0, *numbers])
    exact = {"rtol": 1e-12, "atol": 1e-12 * largest}
    rough = {"rtol": 2e-5, "atol": 2e-6 * (4 + largest)}
    close(loss, true.loss, f"{name} loss", **(exact if wide else rough))
    for k, (g, of_true) in enumerate(zip(gradients, true.gradients, strict=True)):
        assert g.dtype == case.students[k].dtype
        # A stored bfloat16 gradient is cut, then multiplied and rounded.
        step = {torch.bfloat16: 2**-6, torch.float16: 2**-10, torch.float64: 1e-11}
        small = 1e-12 * largest if g.dtype == torch.float64 else 4e-7 * (4 + largest)
        want = upstream.double().numpy()[:, None] * of_true
        close(g, want, f"{name} gradient {k}", step.get(g.dtype, 2e-5), small)


def close(got, want, what, rtol, atol):
    np.testing.assert_allclose(got.double().numpy(), want, rtol, atol, err_msg=what)


@pytest.mark.parametrize("name", NAMES)
@paired(
    "n, c",
    *((n, c, "one block") for n, c in ((2, 2), (2, 3), (3, 33), (1, 128), (1, 300), (1, 40))),
    *((n, c, "tiles") for n, c in ((2, 3), (3, 33), (1, 300))),
)
def test_shapes(name, residency, n, c):
    near(name, cast(make(name, n, c), torch.float32), **settings_for(name, c))


@pytest.mark.parametrize("name", NAMES)
@paired(
    "dtype, stored",
    (torch.float64, True, "one block"),
    (torch.float64, False, "tiles"),
    (torch.bfloat16, True, "tiles"),
    (torch.bfloat16, False, "one block"),
    (torch.float16, True, "one block"),
    (torch.float16, False, "tiles"),
)
def test_types(name, residency, dtype, stored):
    near(name, cast(make(name, 2, 33), dtype), stored_gradient=stored, **FULL[name])


@pytest.mark.parametrize("name", WITH_TEACHER)
@pytest.mark.parametrize(
    "student, teacher",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_mixed_types(name, student, teacher):
    near(name, cast(make(name, 2, 33), student, teacher), **FULL[name])


@pytest.mark.parametrize("name", WITH_TEACHER)
@paired(
    "temperature, on, dtype",
    (0.5, True, torch.float32, "tiles"),
    (0.5, False, torch.float64, "one block"),
    (1.0, True, torch.float64, "one block"),
    (1.0, False, torch.float32, "tiles"),
    (20.0, True, torch.float32, "tiles"),
    (20.0, False, torch.float64, "one block"),
)
def test_temperatures(name, residency, temperature, on, dtype):
    settings = {**FULL[name], "temperature": temperature, **with_switch(name, on)}
    near(name, cast(make(name, 2, 33), dtype), **settings)


def leading(x):
    x[:, :20] = -INF  # more than a tile


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
HARD = [(name, pattern) for name in NAMES if name != "uskd" for pattern in PATTERNS]
HARD += [("uskd", shifted), ("uskd", leading)]  # else the order of equal keys would be the type's


@pytest.mark.parametrize("name, pattern", HARD)
def test_hard_logits(name, pattern, monkeypatch):
    """Of all inputs in float64 and in float32 in tiles, of the student alone in the latter."""
    case = make(name, 4, 33)
    case.target[:] = torch.tensor([0, 32, 5, 19])
    apart = Case([x.clone() for x in case.students], case.teachers, case.target)
    pattern(apart.students[0])
    whole = Case(case.students, [x.clone() for x in case.teachers], case.target)
    for x in (*whole.students, *whole.teachers):
        pattern(x)
    near(name, whole, **FULL[name])
    in_tiles(monkeypatch)
    near(name, cast(whole, torch.float32), **FULL[name])
    if name != "slkd" or pattern in (shifted, constant, ties):
        near(name, cast(apart, torch.float32), **FULL[name])


@pytest.mark.parametrize("name", NAMES)
@paired(
    "dtype",
    (torch.float32, "one block"),
    (torch.float32, "tiles"),
    (torch.bfloat16, "tiles"),
)
def test_offset_logits_keep_their_precision(name, residency, dtype):
    """What can be told apart at 4096 is told apart: multiples of 1/16 in float32."""
    if dtype == torch.bfloat16:
        case = cast(make(name, 2, 33), dtype)
        moved = Case([x.float() + 4096 for x in case.students], case.teachers, case.target)
        case = cast(case, torch.float32, dtype)
    else:
        case = cast(make(name, 2, 33), dtype)
        moved = Case(
            [x + 4096 for x in case.students], [x - 4096 for x in case.teachers], case.target
        )
    here, there = (
        loss_and_gradients(name, x, backend="triton", **FULL[name]) for x in (case, moved)
    )
    rough = 2e-3 if name == "slkd" else 2e-6  # the fused SL-Ts are rounded at the size of the shift
    torch.testing.assert_close(there[0], here[0], rtol=1e-3 if name == "slkd" else 3e-6, atol=1e-6)
    for a, b in zip(there[1], here[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rough)


@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_class_probabilities(name, dtype_by_residency):
    dtype = dtype_by_residency
    case = cast(make(name, 2, 33), dtype)
    for kind in (torch.float64, torch.bfloat16):
        case.target = probabilities(2, 33).to(kind)
        near(name, case, **FULL[name])
    # Not only two classes; equal ones, of which the lower is the label.
    case.target = torch.softmax(torch.arange(2 * 33).reshape(2, 33).double().sin(), 1).to(dtype)
    near(name, case, **FULL[name])
    soft = torch.zeros(2, 33, dtype=dtype)
    for i in range(2):
        soft[i, [5 * i + 1, 32]] = 0.5
    case.target = soft
    near(name, case, **FULL[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "ignored, reduction",
    [
        ("none", "mean"),
        ("some", "mean"),
        ("some", "sum"),
        ("all", "mean"),
        ("all", "sum"),
        ("counted before", "mean"),
    ],
)
def test_reductions_and_terms(name, monkeypatch, ignored, reduction):
    case = make(name, 4, 33)
    if ignored == "all":
        case.target[:] = -100
    elif ignored != "none":
        case.target[::3] = -100
        for x in (*case.students, *case.teachers):
            x[::3] = float("nan")  # a row that does not count may hold anything
    if ignored == "counted before":
        monkeypatch.setattr(triton_call, "COUNTED_BY_EACH", 3)
    students = [x.requires_grad_() for x in case.students]
    settings = {**FULL[name], "backend": "triton", "reduction": reduction, "return_terms": True}
    loss, terms = call(name, case, **settings)
    gradients = torch.autograd.grad(loss, students)
    true = truth(name, case, **FULL[name])
    valid = (case.target != -100).sum().item()
    divisor = max(valid, 1) if reduction == "mean" else 1
    assert loss.item() == pytest.approx(true.loss.sum() / divisor, rel=1e-12, abs=1e-13)
    for g, of_row in zip(gradients, true.gradients, strict=True):
        np.testing.assert_allclose(g.numpy(), of_row / divisor, rtol=1e-11, atol=1e-13)
        assert not g[case.target == -100].any()
    assert set(terms) == set(true.terms) | {"rows"} and terms["rows"].item() == valid
    for key, v in true.terms.items():
        mean = v.sum() / (1 if "top" in key else max(valid, 1))
        assert terms[key].item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_denominator_and_upstream_numbers(name):
    case = cast(make(name, 2, 33), torch.float32)
    total, of_total = loss_and_gradients(
        name, case, reduction="sum", backend="triton", **FULL[name]
    )
    for stored, denominator in ((True, 4.0), (False, torch.tensor(4))):
        settings = {**FULL[name], "backend": "triton", "stored_gradient": stored}
        loss, gradients = loss_and_gradients(
            name, case, torch.tensor(-3.0), denominator=denominator, **settings
        )
        torch.testing.assert_close(loss, total / 4, rtol=1e-6, atol=0)
        for g, of_sum in zip(gradients, of_total, strict=True):
            torch.testing.assert_close(g, -3 * of_sum / 4, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_layouts(name, residency):
    """Columns of a wider tensor, one row for all, transposed: as their copies."""
    n, c = 2, 32
    case = cast(make(name, n, c), torch.float32)
    target = torch.stack([case.target, case.target + 1], 1)[:, 0]

    def wider(x):
        return torch.cat([x[:, :3], x, x], 1)[:, 3 : c + 3]

    for layout in (wider, lambda x: x.T.contiguous().T, lambda x: x[:1].expand(n, c)):
        students, teachers = [layout(x) for x in case.students], [layout(x) for x in case.teachers]
        copies = Case([x.clone() for x in students], [x.clone() for x in teachers], case.target)
        settings = {**FULL[name], "backend": "triton"}
        expected = loss_and_gradients(name, copies, **settings)
        got = loss_and_gradients(name, Case(students, teachers, target), **settings)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_the_same_bits_in_any_batch(name, residency):
    n = 2
    case = cast(make(name, n, 33), torch.float32)
    if name in ("tf_nkd", "uskd"):  # they weigh a row by the batch: only equal rows are singles
        case = Case([x[:1].expand(n, 33) for x in case.students], [], case.target[:1].expand(n))
    settings = {**FULL[name], "backend": "triton", "reduction": "none"}
    loss, gradients = loss_and_gradients(name, case, **settings)
    for i in range(n):
        one = Case([x[i : i + 1] for x in case.students], [], case.target[i : i + 1])
        one.teachers = [x[i : i + 1] for x in case.teachers]
        row, of_row = loss_and_gradients(name, one, **settings)
        assert torch.equal(row[0], loss[i])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(of_row, gradients, strict=True))


@pytest.mark.parametrize("name", ("kd", "dkd"))
@paired(
    "dtype, temperature",
    (torch.float32, 1.0, "one block"),
    (torch.float32, 3.7, "tiles"),
    (torch.bfloat16, 1.0, "tiles"),
    (torch.bfloat16, 3.7, "one block"),
    (torch.float64, 1.0, "one block"),
    (torch.float64, 3.7, "tiles"),
)
def test_student_equal_to_teacher_is_exactly_zero(name, residency, dtype, temperature):
    z = cast(make("kd", 2, 47), dtype).students[0] * 1.37 + 40
    z[:, :1] = -INF  # in both: no mass, no gap
    other = torch.float32 if dtype == torch.bfloat16 else dtype
    more = {"alpha": 0.3, "beta": 5.1} if name == "dkd" else {"kd_weight": 0.7}
    for teacher in (z, z.to(other)):
        case = Case([z], [teacher], torch.arange(2))
        loss, (g,) = loss_and_gradients(
            name, case, temperature=temperature, backend="triton", **more
        )
        assert loss.item() == 0 and not g.any()


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_reach_the_loss_of_their_row(name, residency):
    for which in range(len(make(name, 1, 33).students + make(name, 1, 33).teachers)):
        for value in (torch.nan, INF):
            for column in (4, 20):  # the label, another class in another tile
                case = cast(make(name, 2, 33), torch.float32)
                case.target[:] = torch.tensor([4, 32])
                (case.students + case.teachers)[which][0, column] = value
                rows = call(name, case, reduction="none", backend="triton", **FULL[name])
                assert not rows[0].isfinite()
                if name not in ("tf_nkd", "uskd"):  # whose batch mean is NaN for all rows
                    assert rows[1:].isfinite().all()


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_student_mass_where_the_teacher_has_some(name, residency):
    for column in (4, 20):  # the label of the first row, another class
        case = cast(make(name, 3, 33), torch.float32)
        case.target[:] = torch.tensor([4, 0, 32])
        case.students[0][0, column] = -INF
        settings = {**FULL[name], "reduction": "none", "backend": "triton"}
        loss, gradients = loss_and_gradients(name, case, **settings)
        assert loss[0] == INF and loss[1:].isfinite().all()
        assert gradients[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_hits_are_those_of_a_stable_sort(name, dtype_by_residency):
    n, c, dtype = 6, 40, dtype_by_residency
    case = cast(make(name, n, c), dtype)
    case.students[0][:] = case.students[0].round() if name != "uskd" else case.students[0] // 0.2
    case.students[0][0] = 1.0
    case.students[0][1] = torch.nan
    case.students[0][2, 3] = torch.nan
    case.students[0][3] = -INF
    case.target[:4] = torch.tensor([5, 0, 0, 1])
    kept = call(name, case, return_terms=True, backend="triton", **FULL[name])[1]
    order = case.students[0].sort(dim=1, descending=True, stable=True).indices  # NaN first
    place = (order == case.target[:, None]).int().argmax(1)
    place[1] = c  # a NaN label is never right
    assert kept["top1"].item() == (place < 1).sum().item()
    assert kept["top5"].item() == (place < 5).sum().item()


@pytest.mark.parametrize("name", ("kd",))
def test_several_teachers(name, residency):
    case = cast(make("kd", 2, 33, teachers=3), torch.float32)
    near("kd", case, **FULL["kd"])
    case.teachers[1][:] = torch.nan  # without weight, whatever it holds
    weights = [0.25, 0.0, 0.5]
    loss, (g,) = loss_and_gradients(
        "kd", case, backend="triton", teacher_weights=weights, **FULL["kd"]
    )
    few = Case(case.students, [case.teachers[0], case.teachers[2]], case.target)
    want, (of_want,) = loss_and_gradients(
        "kd", few, backend="triton", teacher_weights=[0.25, 0.5], **FULL["kd"]
    )
    torch.testing.assert_close((loss, g), (want, of_want), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NO_TEACHER)
def test_a_teacher_without_weight_may_hold_anything(name, residency):
    case = cast(make(name, 3, 19), torch.float32)
    more = {**FULL[name], **NO_TEACHER[name], "backend": "triton"}
    want = loss_and_gradients(name, case, **more)
    case.teachers = [
        torch.full_like(t, value) for t, value in zip(case.teachers, (torch.nan, INF), strict=False)
    ]
    torch.testing.assert_close(loss_and_gradients(name, case, **more), want, rtol=0, atol=0)


def test_the_others_of_dkd_do_not_see_a_teachers_label(residency):
    case, more = cast(make("dkd", 3, 19), torch.float32), {**FULL["dkd"], "alpha": 0.0}
    want = loss_and_gradients("dkd", case, backend="triton", **more)
    for value in (torch.nan, INF):
        case.teachers[0].scatter_(1, case.target[:, None], value)
        got = loss_and_gradients("dkd", case, backend="triton", **more)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in WITH_PROBABILITIES if not OPS[n].needs_target])
def test_class_probabilities_without_cross_entropy_may_hold_anything(name, residency):
    case, more = cast(make(name, 3, 19), torch.float32), {**FULL[name], "ce_weight": 0.0}
    case.target = None
    want = loss_and_gradients(name, case, backend="triton", **more)
    case.target = probabilities(3, 19).float()
    case.target[1, 5] = torch.nan
    got = loss_and_gradients(name, case, backend="triton", **more)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ("kd",))
def test_no_target(name, residency):
    case = cast(make("kd", 4, 33, teachers=2), torch.float64)
    case.target = None
    near("kd", case, temperature=3.0, kd_weight=0.7)


@pytest.mark.parametrize("name", ("slkd",))
@paired(
    "count, detach",
    (1, True, "one block"),
    (1, False, "tiles"),
    (3, True, "tiles"),
    (3, False, "one block"),
    (3, False, "tiles"),
)
def test_several_slts(name, residency, detach, count):
    case = cast(make("slkd", 2, 33, slts=count), torch.float32)
    fusion = [(k + 1) * 2 / (count * (count + 1)) for k in range(count)]
    near("slkd", case, **{**FULL["slkd"], "fusion": fusion, "detach_slts": detach})
    near("slkd", case, **{**FULL["slkd"], "fusion": [0.0] * (count - 1) + [1.0]})


@pytest.mark.parametrize("name", ("uskd",))
@pytest.mark.parametrize("rank", ("released", "paper"))
@pytest.mark.parametrize("c", (3, 33, 130))
def test_ranks(name, c, rank):
    random = np.random.default_rng(0)
    z, w = (torch.from_numpy(random.normal(0, spread, (4, c))) for spread in (2.0, 1.5))
    near("uskd", Case([z, w], [], make("uskd", 4, c).target), **{**FULL["uskd"], "rank": rank})


@pytest.mark.parametrize("name", ("uskd",))
def test_rows_too_long_to_rank(name):
    case = cast(make("uskd", 1, 4097), torch.float32)
    with pytest.raises(RuntimeError, match="at most 4096 classes, got 4097; use backend='refer"):
        call("uskd", case, backend="triton")


def listed(t, k, mass, temperature, seed):
    """The k largest logits of a row in a random order, and the whole row that they stand for."""
    c = t.shape[1]
    values, indices = t.topk(k, 1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    values, indices = values[:, order].contiguous(), indices[:, order].contiguous()
    fill = torch.full_like(t[:, 0], -INF)
    if mass is not None:
        m = mass.double()
        odds = (m / (1 - m)).log() + (values.double() / temperature).logsumexp(1)
        fill = (temperature * (odds - np.log(c - k))).to(torch.float64)
    whole = fill.double()[:, None].expand(-1, c).scatter(1, indices, values.double())
    return values, indices, whole


@pytest.mark.parametrize("name", WITH_TOP_K)
@pytest.mark.parametrize("held", (None, torch.float32, torch.float64), ids=str)
def test_listed_teachers(name, dtype_by_residency, held):
    """One of the k largest logits alone, beside a whole one where the loss takes several."""
    n, c, k, dtype = 5, 33, 6, dtype_by_residency
    case = cast(make(name, n, c, teachers=2), dtype)
    students, teachers, target = case.students, case.teachers, case.target
    mass = torch.empty(0)
    if held is not None:
        mass = torch.tensor([0.1, 0.0, 0.9, 1e-4, 0.5], dtype=held)
    t = FULL[name]["temperature"]
    teachers[0][1, 3:] = -INF  # so that classes at -inf are listed
    values, indices, whole = listed(teachers[0], k, mass if held else None, t, 1)
    target[3] = indices[3, 0]
    target[1] = indices[1][values[1] == -INF][0]
    upstream = torch.linspace(-2, 3, n).double()
    sparse = kdfuse.SparseTeacher(values, indices.int(), mass if held else None)
    mixed = Case(students, [sparse, *teachers[1:]], target)
    settings = {**FULL[name], "backend": "triton", "reduction": "none"}
    loss, (g,) = loss_and_gradients(name, mixed, upstream, **settings)
    true = truth(name, Case(students, [whole, *teachers[1:]], target), **FULL[name])
    rtol, atol = (1e-11, 1e-11) if dtype == torch.float64 else (3e-5, 2e-5)
    close(loss, true.loss, f"{name} loss", rtol, atol)
    close(g, upstream.numpy()[:, None] * true.gradients[0], f"{name} gradient", rtol, atol)
    far = kdfuse.SparseTeacher(values + 4096, indices, mass if held else None)
    moved, _ = loss_and_gradients(name, Case(students, [far, *teachers[1:]], target), **settings)
    close(
        moved, true.loss, f"{name} loss far from 0", rtol, 2e-3 if dtype == torch.float32 else atol
    )


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, monkeypatch):
    case = cast(make(name, 2, 5), torch.float32)
    students, teachers, target, params = arguments(name, case, backend="triton", **FULL[name])
    op = getattr(torch.ops.kdfuse_triton, name).default
    students = [x.detach().requires_grad_() for x in students]
    inputs = (students, teachers, [], [], target, None, None, None, params, 1, -100, False)
    torch.library.opcheck(op, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_compile_is_one_graph(name):
    case = cast(make(name, 3, 33), torch.float32)
    want, of_want = loss_and_gradients(name, case, backend="triton", **FULL[name])
    students = [x.detach().requires_grad_() for x in case.students]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(students, teachers, target):
        return call(name, Case(students, teachers, target), backend="triton", **FULL[name])

    loss = step(students, case.teachers, case.target)
    assert torch.equal(loss.detach(), want)
    torch.testing.assert_close(torch.autograd.grad(loss, students), tuple(of_want))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    loss, gradients = loss_and_gradients(
        name, cast(make(name, 0, 33), torch.float32), backend="triton", **FULL[name]
    )
    assert loss == 0 and all(g.shape == (0, 33) for g in gradients)


def test_more_teachers_than_are_unrolled():
    case = cast(make("kd", 2, 5, teachers=9), torch.float32)
    with pytest.raises(RuntimeError, match="at most 8 teachers or SL-Ts; use backend='reference'"):
        kdfuse.kd_loss(case.students[0], case.teachers, backend="triton")


def test_columns_apart_are_refused_by_the_op_itself():
    z, y = torch.zeros(3, 18)[:, ::2], torch.zeros(3, dtype=torch.int64)
    end = (y, None, None, None, [4.0, 16.0, 1.0, 0.0, 1.0], 1, -100, True)
    with pytest.raises(ValueError, match=r"unit stride along the classes; .* call .contiguous\(\)"):
        torch.ops.kdfuse_triton.kd([z], [z], [], [], *end)


def test_the_interpreter_is_taken_by_name_alone():
    assert kdfuse.backends()["triton"] == ""
    z = torch.randn(3, 9)
    assert kdfuse.kernels.backends.choose(None, z) != "triton"


def test_the_counter_is_left_at_0(monkeypatch):
    kept = []

    def counter(at):
        kept.append(torch.zeros(1, dtype=torch.int32))
        return kept[-1]

    monkeypatch.setattr(triton_call, "counter", counter)
    for name in NAMES:
        call(name, cast(make(name, 4, 9), torch.float32), backend="triton", **FULL[name])
    assert len(kept) == len(NAMES) and not torch.cat(kept).any()


def test_interpreter_is_at_work():
    assert triton_launch.INTERPRETED
