"""Laws that hold whatever the numbers are: symmetries, exact zeros, identities, the same bits."""

import pytest
import torch
from calls import FULL, NAMES, WITH_TEACHER, Case, call, cast, loss_and_gradients, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdfuse
from kdfuse.kernels import backends

BACKENDS = [name for name in ("reference", "cpu") if not backends.backends()[name]]
LEVELS = backends.compiled()[0].levels() if "cpu" in BACKENDS else []
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FEW = settings(
    deadline=None,
    max_examples=12,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `level` holds for all examples
)
SHAPE = {"n": st.integers(1, 9), "c": st.sampled_from([3, 7, 8, 9, 16, 31, 33, 65])}


@pytest.fixture(params=LEVELS)
def level(request):
    module = backends.compiled()[0]
    before = module.level()
    module.set_level(request.param)
    yield request.param
    module.set_level(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@FEW
@given(**SHAPE, seed=st.integers(0, 99), temperature=st.floats(0.5, 20))
def test_gradients_sum_to_zero(name, backend, n, c, seed, temperature):
    keep = {**FULL[name]}
    if "temperature" in keep:
        keep["temperature"] = temperature
    _, gradients = loss_and_gradients(name, make(name, n, c, seed=seed), backend=backend, **keep)
    for g in gradients:
        assert g.sum(1).abs().max() < 1e-13 * max(1.0, g.abs().max() * c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@FEW
@given(**SHAPE, seed=st.integers(0, 99), shift=st.sampled_from([-4096, -100, 0.5, 100, 60000]))
def test_a_shift_of_all_logits_changes_nothing(name, backend, n, c, seed, shift):
    # These sums are exact in float32, so that nothing but the loss itself can differ.
    case = cast(make(name, n, c, seed=seed), torch.float32)
    moved = Case(
        [x + (k + 1) * shift for k, x in enumerate(case.students)],
        [x - shift for x in case.teachers],
        case.target,
    )
    loss, gradients = loss_and_gradients(name, case, backend=backend, **FULL[name])
    shifted, of_shifted = loss_and_gradients(name, moved, backend=backend, **FULL[name])
    # Where SL-Ts are fused, their sum is rounded at the size of the shift.
    rough = name == "slkd" and abs(shift) > 1000
    torch.testing.assert_close(shifted, loss, rtol=1e-3 if rough else 3e-6, atol=1e-6)
    for a, b in zip(of_shifted, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3 if rough else 2e-6)


@pytest.mark.parametrize("name", ("kd", "dkd"))
@FEW
@given(**SHAPE, dtype=st.sampled_from(TYPES), temperature=st.floats(0.5, 20), beta=st.floats(0, 9))
def test_student_equal_to_teacher_is_exactly_zero(name, level, n, c, dtype, temperature, beta):
    z = cast(make("kd", n, c), dtype).students[0] * 1.37
    z[:, :1] = -torch.inf  # in both: no mass, no gap
    other = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    more = {"alpha": 0.3, "beta": beta} if name == "dkd" else {"kd_weight": beta}
    target = torch.arange(n) % c
    for teacher in (z, z.to(other)):
        case = Case([z], [teacher], target)
        loss, (g,) = loss_and_gradients(name, case, temperature=temperature, backend="cpu", **more)
        assert loss.item() == 0 and not g.any()


@pytest.mark.parametrize("name", ("kd", "dkd"))
@pytest.mark.parametrize("c", (3, 33, 1001, 21841))
def test_student_equal_to_teacher_over_many_classes(name, level, c):
    z = torch.randn(3, c, generator=torch.Generator().manual_seed(0)) * 5 + 40
    case = Case([z], [z.clone()], torch.tensor([0, c - 1, c // 2]))
    loss, (g,) = loss_and_gradients(name, case, temperature=3.0, backend="cpu")
    assert loss.item() == 0 and not g.any()


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(**SHAPE, seed=st.integers(0, 99), temperature=st.floats(0.5, 20))
def test_wttm_at_temperature_1_is_kd_and_its_weight_is_the_power_sum(
    backend, n, c, seed, temperature
):
    """At T = 1 the teacher is not transformed and every row weighs 1; TTM is WTTM less U."""
    case = make("wttm", n, c, seed=seed)
    (z,), (t,), y = case.students, case.teachers, case.target
    common = {"reduction": "none", "backend": backend, "ce_weight": 0.3}
    kd = kdfuse.kd_loss(z, t, y, temperature=1.0, **common)
    for weighted in (True, False):
        at_one = kdfuse.wttm_loss(z, t, y, temperature=1.0, weighted=weighted, **common)
        torch.testing.assert_close(at_one, kd, rtol=1e-11, atol=1e-11)
    u = (t.log_softmax(1) / temperature).exp().sum(1)
    common = {"temperature": temperature, "reduction": "none", "backend": backend}
    wttm, ttm = (kdfuse.wttm_loss(z, t, weighted=w, **common) for w in (True, False))
    torch.testing.assert_close(wttm, u * ttm, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(**SHAPE, seed=st.integers(0, 99), temperature=st.floats(0.5, 20))
def test_dkd_with_the_teachers_rest_as_beta_is_kd(backend, n, c, seed, temperature):
    """KD = TCKD + (1 - b_T) NCKD, with b_T the teacher's probability of the label."""
    case = make("dkd", n, c, seed=seed)
    (t,), y = case.teachers, case.target
    rest = 1 - (t / temperature).softmax(1)[torch.arange(n), y]
    z = case.students[0].requires_grad_()
    common = {"temperature": temperature, "reduction": "none", "backend": backend}
    parts = [
        kdfuse.dkd_loss(z, t, y, alpha=alpha, beta=1 - alpha, **common) for alpha in (1.0, 0.0)
    ]
    joined = parts[0] + rest * parts[1]
    kd = kdfuse.kd_loss(z, t, **common)
    torch.testing.assert_close(joined, kd, rtol=1e-10, atol=1e-10)
    got, want = (torch.autograd.grad(x.sum(), z)[0] for x in (joined, kd))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(**SHAPE, count=st.integers(1, 5))
def test_equal_teachers_are_one(backend, n, c, count):
    case = make("kd", n, c)
    many = Case(case.students, case.teachers * count, case.target)
    one = loss_and_gradients("kd", case, backend=backend, **FULL["kd"])
    torch.testing.assert_close(
        loss_and_gradients("kd", many, backend=backend, **FULL["kd"]), one, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_slt_with_all_the_weight_is_a_second_teacher(backend):
    case = make("slkd", 9, 33, slts=3)
    z, s = case.students[0].requires_grad_(), [x.requires_grad_() for x in case.students[1:]]
    weights = {"temperature": 3.0, "ce_weight": 0.2, "kd_weight": 0.7}
    fused = {"fused_ce_weight": 0.4, "fused_kd_weight": 0.5, "fusion": [0.0, 1.0, 0.0]}
    (t,), y = case.teachers, case.target
    got = kdfuse.slkd_loss(z, t, s, y, backend=backend, **weights, **fused)
    want = kdfuse.kd_loss(z, t, y, temperature=3.0, kd_weight=0.7, ce_weight=0.6, backend=backend)
    want = want + kdfuse.kd_loss(z, s[1].detach(), temperature=3.0, kd_weight=0.5, backend=backend)
    for x in s:
        want = want + kdfuse.kd_loss(x, t, y, **weights, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    inputs = [z, *s]
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_the_mean_of_its_rows(name, backend):
    n = 7
    case = cast(make(name, n, 33), torch.float32)
    rows, by_rows = [], []
    if name in ("tf_nkd", "uskd"):
        # They weigh a row by the batch: only equal rows are a batch of singles.
        case = Case([x[:1].expand(n, 33) for x in case.students], [], case.target[:1].expand(n))
    for i in range(n):
        one = Case([x[i : i + 1] for x in case.students], [], case.target[i : i + 1])
        one.teachers = [x[i : i + 1] for x in case.teachers]
        loss, gradients = loss_and_gradients(name, one, backend=backend, **FULL[name])
        rows.append(loss)
        by_rows.append(gradients)
    settings = {**FULL[name], "backend": backend, "reduction": "none"}
    loss, gradients = loss_and_gradients(name, case, **settings)
    close = {"rtol": 1e-6, "atol": 1e-7} if backend == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(loss, torch.stack(rows), **close)  # the same bits in any batch
    for g, *of_rows in zip(gradients, *by_rows, strict=True):
        torch.testing.assert_close(g, torch.cat(of_rows), **close)
    mean = call(name, case, backend=backend, **FULL[name])
    torch.testing.assert_close(mean, loss.double().mean().float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@FEW
@given(**SHAPE, seed=st.integers(0, 99))
def test_permuted_classes_permute_the_gradients(name, backend, n, c, seed):
    case = make(name, n, c, seed=seed)
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
    where = torch.empty_like(order)
    where[order] = torch.arange(c)
    moved = Case(
        [x[:, order] for x in case.students],
        [x[:, order] for x in case.teachers],
        where[case.target],
    )
    loss, gradients = loss_and_gradients(name, case, backend=backend, **FULL[name])
    permuted, of_permuted = loss_and_gradients(name, moved, backend=backend, **FULL[name])
    torch.testing.assert_close(permuted, loss, rtol=1e-12, atol=1e-13)
    for a, b in zip(of_permuted, gradients, strict=True):
        torch.testing.assert_close(a, b[:, order], rtol=1e-10, atol=1e-13)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled module")
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_at_any_number_of_threads(name):
    case = cast(make(name, 999, 257), torch.float32)
    case.target[::7] = -100
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            students = [x.detach().requires_grad_() for x in case.students]
            loss, terms = call(
                name,
                Case(students, case.teachers, case.target),
                return_terms=True,
                backend="cpu",
                **FULL[name],
            )
            results.append([loss, *terms.values(), *torch.autograd.grad(loss, students)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def poisoned(bits: int) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("bits", (0x7FC00001, 0x7F800001, -0x400000, -0x7FFFFF, 0x7FFFFFFF))
@pytest.mark.parametrize("name", NAMES)
def test_nan_of_any_payload_reaches_the_loss(name, level, bits):
    """At the label, in the first vector, in the last; in a student or a teacher; that row alone."""
    case = cast(make(name, 5, 33), torch.float32)
    case.target[:] = torch.tensor([4, 0, 32, 7, 1])
    for which in range(len(case.students) + len(case.teachers)):
        for column in (0, 4, 20, 32):
            students, teachers = ([x.clone() for x in s] for s in (case.students, case.teachers))
            (students + teachers)[which][0, column] = poisoned(bits)
            poor = Case(students, teachers, case.target)
            rows = call(name, poor, reduction="none", backend="cpu", **FULL[name])
            assert rows[0].isnan()
            if name not in ("tf_nkd", "uskd"):  # whose batch mean is NaN for all rows
                assert rows[1:].isfinite().all()
            assert call(name, poor, backend="cpu", **FULL[name]).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_in_other_types(name, backend, dtype):
    for value in (torch.nan, torch.inf):
        for column in (4, 20):
            case = cast(make(name, 5, 33), dtype)
            case.target[0] = 4
            case.students[0][0, column] = value
            assert not call(name, case, backend=backend, **FULL[name]).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_student_mass_where_the_teacher_has_some(name, backend):
    case = cast(make(name, 5, 33), torch.float32)
    case.target[:] = torch.tensor([4, 0, 32, 7, 1])
    for column in (4, 20):  # the label of the first row, another class
        case.students[0][:] = cast(make(name, 5, 33), torch.float32).students[0]
        case.students[0][0, column] = -torch.inf
        settings = {**FULL[name], "reduction": "none", "backend": backend}
        loss, gradients = loss_and_gradients(name, case, **settings)
        assert loss[0] == torch.inf and loss[1:].isfinite().all()
        if name != "slkd":  # its SL-Ts are asked to leave a class that the student cannot have
            assert all(g.isfinite().all() for g in gradients)
        else:
            assert gradients[0].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_label_that_is_nan_is_never_right(level, dtype):
    """Nor where the classes, padded to a vector, are fewer than five."""
    for c in (2, 3, 9):
        z = torch.zeros(1, c, dtype=dtype)
        z[0, 1] = torch.nan
        for backend in ("cpu", "reference"):
            loss = kdfuse.kd_loss(z, z, torch.tensor([1]), return_terms=True, backend=backend)
            assert (loss[1]["top1"], loss[1]["top5"]) == (0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_hits_are_those_of_a_stable_sort(name, backend, dtype):
    """top-1 and top-5 with ties, first index first; a row that is all alike is no hit by itself."""
    n, c = 64, 9
    case = cast(make(name, n, c), dtype)
    case.students[0][:] = case.students[0].round() if name != "uskd" else case.students[0] // 0.2
    case.students[0][0] = 1.0
    case.students[0][1] = torch.nan
    case.students[0][2, 3] = torch.nan
    case.students[0][3] = -torch.inf
    case.target[:4] = torch.tensor([5, 0, 0, 1])
    kept = call(name, case, return_terms=True, backend=backend, **FULL[name])[1]
    order = case.students[0].sort(dim=1, descending=True, stable=True).indices  # NaN first
    place = (order == case.target[:, None]).int().argmax(1)
    place[1] = c  # a NaN label is never right
    assert kept["top1"].item() == (place < 1).sum().item()
    assert kept["top5"].item() == (place < 5).sum().item()
    assert place[0] == 5 and place[2] > 0
    if name == "slkd":
        order = case.students[2].sort(dim=1, descending=True, stable=True).indices
        place = (order == case.target[:, None]).int().argmax(1)
        assert kept["slt1_top5"].item() == (place < 5).sum().item()
